"""The hinge and R1 against closed forms, and the weight that balances two gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.losses.adversarial import (
    adaptive_weight,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
)


def test_the_hinge_is_two_for_no_opinion_and_nothing_beyond_a_margin_of_one():
    real, fake = jnp.array([[0.0, 0.0], [1.0, 5.0], [-1.0, 1.0]]), jnp.array([[0.0, 0.0], [-1.0, -9.0], [-1.0, -1.0]])
    np.testing.assert_allclose(hinge_discriminator_loss(real, fake), [2.0, 0.0, 1.0])
    np.testing.assert_allclose(hinge_generator_loss(fake), [0.0, 5.0, 1.0])


def test_half_precision_logits_are_averaged_in_float32():
    logits = jnp.full((1, 1001), 0.5, jnp.bfloat16)
    assert hinge_generator_loss(logits) == -0.5
    assert hinge_discriminator_loss(logits, logits).dtype == jnp.float32


def test_the_gradient_penalty_of_linear_heads_is_the_mean_of_their_squared_weights_for_each_example():
    w = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[1.0, 2.0]])}
    x = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), (5, *leaf.shape)), w)

    def linear(x):
        return {"a": x["a"] @ w["a"], "b": jnp.sum(x["b"] * w["b"], axis=(1, 2))}

    np.testing.assert_allclose(gradient_penalty(linear, x), np.full(5, (25.0 + 5.0) / 2), rtol=1e-6)


@pytest.mark.parametrize("cells", [1, 4, 16])
def test_the_gradient_penalty_counts_every_cell(cells):
    x = jax.random.normal(jax.random.key(0), (3, cells, 2))
    np.testing.assert_allclose(gradient_penalty(lambda x: x @ jnp.array([3.0, 4.0]), x), 25.0 * cells, rtol=1e-6)
    quadratic = gradient_penalty(lambda x: jnp.square(x), x)  # the sum of squares: gradient 2 x
    np.testing.assert_allclose(quadratic, 4 * jnp.sum(jnp.square(x), axis=(1, 2)), rtol=1e-6)


def test_the_penalty_can_be_differentiated_by_the_discriminator():
    x = jnp.ones((4, 3))
    slope = jax.grad(lambda w: gradient_penalty(lambda x: x @ w, x).mean())(jnp.array([1.0, -2.0, 3.0]))
    np.testing.assert_allclose(slope, [2.0, -4.0, 6.0])


def test_the_adaptive_weight_makes_both_gradients_equally_long_and_is_a_constant_to_them():
    assert float(adaptive_weight(jnp.float32(3.0), jnp.float32(0.5))) == pytest.approx(6.0, rel=1e-3)
    assert float(adaptive_weight(jnp.float32(3.0), jnp.float32(0.0))) == 1e4
    assert float(jax.grad(lambda norm: adaptive_weight(norm, jnp.float32(0.5)))(jnp.float32(3.0))) == 0.0
