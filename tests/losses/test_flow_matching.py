"""The flow matching loss: one float32 number an example, and its known floor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import expand_like, interpolate, velocity
from snapgen_jax.losses.flow_matching import flow_matching_loss


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 4), (2, 4, 4, 3), (2, 2, 4, 4, 3)])
def test_each_example_is_scored_by_its_own_mean_squared_error(shape):
    target = jax.random.normal(jax.random.key(0), shape)
    off_by = jnp.array([0.5, 2.0])
    loss = flow_matching_loss(target + expand_like(off_by, target), target)
    np.testing.assert_allclose(loss, [0.25, 4.0], rtol=1e-5)


def test_half_precision_predictions_are_scored_in_float32():
    v = jnp.ones((2, 1001), jnp.bfloat16)  # a bfloat16 sum of a thousand ones would stall at 256
    loss = flow_matching_loss(v, jnp.zeros((2, 1001), jnp.bfloat16))
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, 1.0)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_exact_velocity_of_gaussian_data_reaches_the_conditional_variance_and_nothing_goes_below(t):
    # x_0 ~ N(0, s): Var[eps - x_0 | x_t] = s / c with c = (1-t)^2 s + t^2, reached by v = (t - (1-t) s) / c x_t.
    s = 0.3
    c = (1 - t) ** 2 * s + t**2
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 1, 400_000))
    x_0 = np.sqrt(s) * x_0
    slope = (t - (1 - t) * s) / c
    x_t, target = interpolate(x_0, eps, t), velocity(x_0, eps)
    exact, *others = [float(flow_matching_loss(k * x_t, target)[0]) for k in (slope, slope + 0.1, slope - 0.1)]
    assert exact == pytest.approx(s / c, rel=0.01)
    assert all(other > exact for other in others)


def test_a_prediction_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 1\)"):
        flow_matching_loss(jnp.ones((2, 4)), jnp.ones((2, 1)))
