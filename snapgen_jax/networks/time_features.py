"""Sinusoidal features of the diffusion time.

They are an input of the networks and no part of them: a phone's GPU computes sine and cosine too coarsely, and a
float16 copy of the frequency table makes the error grow with the time, so the client computes them in float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

TIME_SCALE = 1000.0
MAX_PERIOD = 10_000.0


def time_features(t: jax.Array, dim: int = 256, scale: float = TIME_SCALE, shift: int = 0) -> jax.Array:
    """Cosines, then sines, of `scale * t` at `dim / 2` frequencies that fall geometrically from 1 towards 1/10000.

    Args:
        t: `[B]` diffusion times: in [0, 1], or a schedule's native times.
        dim: even number of features.
        scale: factor of the times; 1 for native times, such as the steps of Stable Diffusion 1.5.
        shift: the last frequency is 1/10000 with 1, and one place before it with 0, as in nearly all networks.

    Returns:
        `[B, dim]` float32.

    Raises:
        ValueError: `dim` is odd.

    Source: Vaswani et al. 2017, section 3.5, in the order [cos, sin] of Stable Diffusion's networks.
    """
    if dim % 2:
        raise ValueError(f"time_features needs an even number of features, not dim={dim}")
    half = dim // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) / (half - shift) * jnp.arange(half, dtype=jnp.float32))
    angles = (scale * t.astype(jnp.float32))[:, None] * frequencies  # [B, dim/2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
