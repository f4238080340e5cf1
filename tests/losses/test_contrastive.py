"""The contrastive loss at its ends."""

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.losses.contrastive import contrastive_loss


def test_nothing_told_apart_costs_log_b_and_everything_told_apart_costs_nothing():
    same = jnp.ones((8, 4))
    np.testing.assert_allclose(contrastive_loss(same, same, jnp.float32(2.0)), np.log(8), rtol=1e-6)
    apart = 7 * jnp.eye(8)
    np.testing.assert_allclose(contrastive_loss(apart, 0.1 * apart, jnp.log(100.0)), 0.0, atol=1e-6)


def test_an_image_whose_text_fits_another_costs_and_the_scale_stops_at_a_hundred():
    image, text = jnp.eye(2), jnp.eye(2)[::-1]
    np.testing.assert_allclose(contrastive_loss(image, text, jnp.float32(0.0)), np.log(1 + np.e), rtol=1e-6)
    np.testing.assert_allclose(contrastive_loss(image, text, jnp.float32(50.0)), 100.0, rtol=1e-6)


def test_images_and_texts_play_the_same_part():
    image, text = jax.random.normal(jax.random.key(0), (2, 6, 16))
    scale = jnp.float32(1.0)
    np.testing.assert_allclose(contrastive_loss(image, text, scale), contrastive_loss(text, image, scale), rtol=1e-5)
