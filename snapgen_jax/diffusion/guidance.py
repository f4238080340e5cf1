"""Classifier-free guidance: train with the condition dropped now and then, extrapolate when sampling.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance". Guidance may be confined to a band of times, outside of which
the network is asked once, with the condition alone: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval
Improves Sample and Distribution Quality in Diffusion Models" (arXiv 2404.07724).

A condition is any tree whose leaves are `[B, ...]`; the null condition is the same tree, its leaves broadcast against
those (`[1, ...]`, or without the batch axis).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.diffusion.path import expand_like
from snapgen_jax.diffusion.samplers import Carry, Denoise

Condition = Any
ConditionalDenoise = Callable[[jax.Array, jax.Array, jax.Array, Carry, Condition], tuple[jax.Array, Carry]]
ALL_TIMES = (0.0, 1.0)


def guided(v_null: jax.Array, v_cond: jax.Array, w: jax.typing.ArrayLike) -> jax.Array:
    """The guided velocity, `v = v_null + w (v_cond - v_null)`.

    Ho & Salimans 2022, eq. 6, with their w one smaller: here w = 0 is unconditional, w = 1 conditional, w > 1 guided.

    Args:
        v_null, v_cond: `[B, ...]` velocities without and with the condition.
        w: guidance scale: a scalar, one an example `[B]`, or an array with as many axes as v that broadcasts to it:
            `[1, 1, 1, C]` is one a channel, `[1, F, 1, 1, 1]` one a frame.

    Raises:
        ValueError: w is none of these.
    """
    return v_null + _scale_like(w, v_null) * (v_cond - v_null)


def guided_from(v_cond: jax.Array, v_null: jax.Array, w: jax.typing.ArrayLike) -> jax.Array:
    """`guided` in the form `v_cond + (w - 1) (v_cond - v_null)`, which is `v_cond` bit for bit where w = 1."""
    return guided(v_cond, v_null, 1 - jnp.asarray(w))


def _scale_like(w: jax.typing.ArrayLike, v: jax.Array) -> jax.Array:
    """The guidance scale with the axes of v, or a scalar; see `guided`."""
    given = np.shape(w)
    w = expand_like(w, v) if len(given) < 2 else jnp.asarray(w)
    if w.ndim not in (0, v.ndim) or any(n not in (1, m) for n, m in zip(w.shape, v.shape, strict=False)):
        raise ValueError(
            f"a guidance scale of shape {given} does not fit a velocity of shape {v.shape}; give a scalar, one an "
            f"example ({v.shape[0]},), or an array of {v.ndim} axes that broadcasts to the velocity"
        )
    return w


def check_interval(interval: tuple[float, float]) -> None:
    """Raises `ValueError` where (t_low, t_high) is no interval of times, from 0 (data) to 1 (noise)."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"guidance_interval={(low, high)}; give (t_low, t_high) with 0 <= t_low <= t_high <= 1, and (0, 1) for all "
            "times"
        )


def guided_times(times: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """At which times of a grid guidance is asked for: bool like `times` `[S + 1]`, t_low <= t <= t_high.

    Kynkäänniemi et al. 2024, section 3, whose noise level sigma is t = sigma / (1 + sigma) here.

    Raises:
        ValueError: guidance would be asked for nowhere, since no time but the last lies inside.
    """
    low, high = np.asarray(interval, times.dtype)
    inside = (low <= times) & (times <= high)
    if not inside[:-1].any():
        between = ", ".join(f"{t:.3g}" for t in times[:-1])
        raise ValueError(
            f"guidance_interval={tuple(interval)} holds none of the times that are sampled at: {between}; widen it, or "
            "set guidance=1 for none"
        )
    return inside


def with_guidance(
    denoise: ConditionalDenoise,
    condition: Condition,
    null: Condition,
    w: jax.typing.ArrayLike,
    when: np.ndarray | None = None,
) -> Denoise:
    """Binds a condition to a denoiser and guides it, for `sample`. One call on a doubled batch does both velocities.

    Args:
        denoise: `(x_t, t, i, carry, condition) -> (v, carry)`. Its batch, and that of any activations in the carry, is
            2 B: examples 2b and 2b + 1 are the null and the conditional half of example b. `i` and the carry pass
            through as they are, so that the carry given to `sample` has 2 B rows too.
        condition, null: see the top of this file.
        w: guidance scale, as for `guided`. At the Python number 1 guidance is the identity, and `denoise` is called
            once on the B conditional examples.
        when: bool `[S + 1]`, at which times of the grid to guide, by the index that `denoise` receives; None for all.
            At the others `denoise` is called once on the B conditional examples. With activations in the carry it is
            called on both halves at all times, since those of either half go on to the next call.

    Raises:
        ValueError: when called, if w does not fit the velocity.
    """
    if isinstance(w, int | float) and w == 1:
        return lambda x_t, t, i, carry: denoise(x_t, t, i, carry, condition)

    # The halves are interleaved, not concatenated: a batch split over devices then stays where it is.
    def pair(null_leaf, leaf):
        return jnp.stack([null_leaf, leaf], axis=1).reshape(2 * leaf.shape[0], *leaf.shape[1:])

    pairs = jax.tree.map(pair, null_like(null, condition), condition)

    def halves(x_t, t, i, carry):
        v, carry = denoise(pair(x_t, x_t), pair(t, t), i, carry, pairs)
        v = v.reshape(x_t.shape[0], 2, *x_t.shape[1:])
        return v[:, 0], v[:, 1], carry

    def both(x_t, t, i, carry):
        v_null, v_cond, carry = halves(x_t, t, i, carry)
        return guided(v_null, v_cond, w).astype(jnp.float32), carry

    def conditional(x_t, t, i, carry):
        if jax.tree.leaves(carry):
            _, v_cond, carry = halves(x_t, t, i, carry)
        else:
            v_cond, carry = denoise(x_t, t, i, carry, condition)
        return v_cond.astype(jnp.float32), carry

    if when is None or when.all():
        return both
    # The times are few and one program serves all of them, so that it holds both calls; a step runs one.
    return lambda x_t, t, i, carry: jax.lax.cond(jnp.asarray(when)[i], both, conditional, x_t, t, i, carry)


def null_like(null: Condition, condition: Condition) -> Condition:
    """The null condition of as many examples as a condition has."""
    return jax.tree.map(lambda null_leaf, leaf: jnp.broadcast_to(null_leaf, leaf.shape), null, condition)


def draw_kept(key: jax.Array, batch: int, rate: float) -> jax.Array:
    """Which examples keep their condition, bool `[batch]`: False with probability `rate`, the dropout.

    Ho & Salimans 2022, algorithm 1, line 3.
    """
    return ~jax.random.bernoulli(key, rate, (batch,))


def keep(kept: jax.Array, condition: Condition, null: Condition) -> Condition:
    """The condition where `kept` `[B]` is True and the null condition elsewhere, all leaves together."""
    return jax.tree.map(lambda leaf, null_leaf: jnp.where(expand_like(kept, leaf), leaf, null_leaf), condition, null)
