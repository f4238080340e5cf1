"""Conditional flow matching: squared error of the velocity."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def flow_matching_loss(v: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of a predicted velocity, a mean over all axes but the first.

        L = || v - (eps - x_0) ||^2

    Liu et al. 2022, "Flow Straight and Fast", eq. 1. The mean over the batch, and any weight in time, are left to the
    recipe.

    Args:
        v: `[B, ...]` predicted velocity, any float dtype.
        target: `[B, ...]` velocity of the path, `eps - x_0`.

    Returns:
        `[B]` float32.
    """
    if v.shape != target.shape:
        raise ValueError(
            f"the predicted velocity has shape {v.shape} and the target {target.shape}; they must be equal"
        )
    error = v.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
