"""Classifier-free guidance: train with the condition dropped now and then, extrapolate when sampling.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance". A condition is any tree whose leaves are `[B, ...]`; the null
condition is the same tree, its leaves broadcast against those (`[1, ...]`, or without the batch axis).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.diffusion.path import expand_like
from snapgen_jax.diffusion.samplers import Carry, Denoise

Condition = Any
ConditionalDenoise = Callable[[jax.Array, jax.Array, jax.Array, Carry, Condition], tuple[jax.Array, Carry]]


def guided(v_null: jax.Array, v_cond: jax.Array, w: jax.typing.ArrayLike) -> jax.Array:
    """The guided velocity, `v = v_null + w (v_cond - v_null)`.

    Ho & Salimans 2022, eq. 6, with their w one smaller: here w = 0 is unconditional, w = 1 conditional, w > 1 guided.

    Args:
        v_null, v_cond: `[B, ...]` velocities without and with the condition.
        w: guidance scale, a scalar or one an example `[B]`.
    """
    return v_null + expand_like(w, v_null) * (v_cond - v_null)


def with_guidance(
    denoise: ConditionalDenoise, condition: Condition, null: Condition, w: jax.typing.ArrayLike
) -> Denoise:
    """Binds a condition to a denoiser and guides it, for `sample`. One call on a doubled batch does both velocities.

    Args:
        denoise: `(x_t, t, i, carry, condition) -> (v, carry)`. Its batch, and that of any activations in the carry, is
            2 B: examples 2b and 2b + 1 are the null and the conditional half of example b.
        condition, null: see the top of this file.
        w: guidance scale, a scalar or `[B]`. At the Python number 1 guidance is the identity, and `denoise` is called
            once on the B conditional examples.
    """
    if isinstance(w, int | float) and w == 1:
        return lambda x_t, t, i, carry: denoise(x_t, t, i, carry, condition)

    # The halves are interleaved, not concatenated: a batch split over devices then stays where it is.
    def pair(null_leaf, leaf):
        both = jnp.stack([jnp.broadcast_to(null_leaf, leaf.shape), leaf], axis=1)
        return both.reshape(2 * leaf.shape[0], *leaf.shape[1:])

    pairs = jax.tree.map(pair, null, condition)

    def guided_denoise(x_t, t, i, carry):
        v, carry = denoise(pair(x_t, x_t), pair(t, t), i, carry, pairs)
        v = v.reshape(x_t.shape[0], 2, *x_t.shape[1:])
        return guided(v[:, 0], v[:, 1], w), carry

    return guided_denoise


def drop_condition(key: jax.Array, condition: Condition, null: Condition, rate: float) -> Condition:
    """Replaces each example's condition by the null condition with probability `rate`, all leaves together.

    Ho & Salimans 2022, algorithm 1, line 3.
    """
    batch = jax.tree.leaves(condition)[0].shape[0]
    drop = jax.random.bernoulli(key, rate, (batch,))
    return jax.tree.map(lambda null_leaf, leaf: jnp.where(expand_like(drop, leaf), null_leaf, leaf), null, condition)
