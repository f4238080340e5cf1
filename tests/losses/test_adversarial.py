"""The hinge game by hand, and the weight that balances two gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.losses.adversarial import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss


def test_hinge_losses_by_hand():
    real = jnp.array([[[2.0], [0.5]], [[-1.0], [1.0]]])
    fake = jnp.array([[[-3.0], [0.0]], [[1.0], [-0.5]]])
    np.testing.assert_allclose(hinge_discriminator_loss(real, fake), [0.25 + 0.5, 1.0 + 1.25])
    np.testing.assert_allclose(hinge_generator_loss(fake), [1.5, -0.25])


def test_logits_that_are_right_by_the_margin_teach_the_discriminator_nothing():
    grads = jax.grad(lambda real, fake: hinge_discriminator_loss(real, fake).sum(), argnums=(0, 1))
    for real, fake in ((jnp.array([1.5]), jnp.array([-1.5])), (jnp.array([0.5]), jnp.array([-0.5]))):
        expected = 0.0 if real[0] > 1 else 1.0
        given = grads(real, fake)
        np.testing.assert_array_equal([-given[0][0], given[1][0]], [expected, expected])


def test_each_example_counts_by_itself_and_bfloat16_is_summed_in_float32():
    logits = jnp.full((2, 1000), 1.0, jnp.bfloat16).at[1].set(-1.0)
    loss = hinge_generator_loss(logits)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, [-1.0, 1.0])


def test_the_adaptive_weight_makes_both_gradients_equally_long_and_is_a_constant_to_them():
    assert float(adaptive_weight(jnp.float32(3.0), jnp.float32(0.5))) == pytest.approx(6.0, rel=1e-3)
    assert float(adaptive_weight(jnp.float32(3.0), jnp.float32(0.0))) == 1e4
    assert float(jax.grad(lambda n: adaptive_weight(n, jnp.float32(0.5)))(jnp.float32(3.0))) == 0.0


def test_another_number_of_generated_examples_is_refused():
    with pytest.raises(ValueError, match="2 real examples came with 3 generated ones"):
        hinge_discriminator_loss(jnp.zeros(2), jnp.zeros(3))
