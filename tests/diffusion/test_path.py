"""The straight path: its ends, its velocity, and that no rank is assumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import eps_from_velocity, expand_like, interpolate, velocity, x0_from_velocity

SHAPES = {"vectors": (4, 3), "blocks": (4, 3, 2), "images": (4, 5, 5, 3), "clips": (4, 2, 5, 5, 3)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def ends(request):
    x_0, eps = jax.random.normal(jax.random.key(0), (2, *request.param))
    return x_0, eps


def test_path_starts_at_data_and_ends_at_noise(ends):
    x_0, eps = ends
    np.testing.assert_array_equal(interpolate(x_0, eps, jnp.zeros(4)), x_0)
    np.testing.assert_array_equal(interpolate(x_0, eps, jnp.ones(4)), eps)


def test_velocity_is_the_derivative_of_the_path(ends):
    x_0, eps = ends
    _, derivative = jax.jvp(lambda t: interpolate(x_0, eps, t), (jnp.full(4, 0.3),), (jnp.ones(4),))
    np.testing.assert_allclose(derivative, velocity(x_0, eps), atol=1e-6)


def test_both_ends_are_recovered_from_any_point_and_its_velocity(ends):
    x_0, eps = ends
    t = jnp.array([0.0, 0.2, 0.7, 1.0])
    x_t, v = interpolate(x_0, eps, t), velocity(x_0, eps)
    np.testing.assert_allclose(x0_from_velocity(x_t, v, t), x_0, atol=1e-6)
    np.testing.assert_allclose(eps_from_velocity(x_t, v, t), eps, atol=1e-6)


def test_each_example_has_its_own_time_and_a_scalar_is_everybodys(ends):
    x_0, eps = ends
    t = jnp.array([0.1, 0.4, 0.6, 0.9])
    one_by_one = jnp.stack([interpolate(x_0[b], eps[b], t[b]) for b in range(4)])
    np.testing.assert_allclose(interpolate(x_0, eps, t), one_by_one, atol=1e-6)
    np.testing.assert_array_equal(interpolate(x_0, eps, 0.25), interpolate(x_0, eps, jnp.full(4, 0.25)))


def test_expand_like_only_appends_axes():
    assert expand_like(jnp.ones(4), jnp.ones((4, 2, 5, 5, 3))).shape == (4, 1, 1, 1, 1)
    assert expand_like(jnp.ones(4), jnp.ones(4)).shape == (4,)
    assert expand_like(0.5, jnp.ones((4, 2))).shape == ()
