"""Exponential moving average of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def update_ema(ema: Tree, params: Tree, step: jax.Array, decay: float) -> Tree:
    """`ema <- d ema + (1-d) params` in float32, with `d = min(decay, (1 + step) / (10 + step))`.

    The ramp keeps the first steps, whose weights are still close to their initial values, out of the average.

    Args:
        step: int32 scalar, updates done before this one.
        decay: the final decay, 0.9999 say. A horizon of n steps is `1 - 1/n`.
    """
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(jnp.float32) - e), ema, params)
