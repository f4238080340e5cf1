"""Contrastive learning of images and texts."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def contrastive_loss(image: jax.Array, text: jax.Array, log_scale: jax.Array) -> jax.Array:
    """The symmetric cross entropy of matching each image with its text among all of the batch.

        L_i = - (log softmax_j(s <f_i, g_j>)_i + log softmax_j(s <f_j, g_i>)_i) / 2,   |f_i| = |g_i| = 1

    Radford et al. 2021, figure 3; s = exp(log_scale), at most 100 (section 2.5).

    Args:
        image, text: `[B, D]` embeddings, of any length.
        log_scale: scalar, learned.

    Returns:
        `[B]` float32; log B where nothing is told apart.
    """
    scale = jnp.minimum(jnp.exp(log_scale), 100.0)
    logits = scale * normalised(image) @ normalised(text).T
    of_image, of_text = (jnp.diagonal(jax.nn.log_softmax(logits, axis=axis)) for axis in (1, 0))
    return -(of_image + of_text) / 2


def normalised(x: jax.Array) -> jax.Array:
    """`[..., D]` in float32, scaled to length one."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
