"""Samplers: carry noise to data along dx/dt = v(x, t), or by jumps, over an explicit array of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Carry = Any
Denoise = Callable[[jax.Array, jax.Array, jax.Array, Carry], tuple[jax.Array, Carry]]
Method = Literal["euler", "heun", "renoise"]


def sample(
    denoise: Denoise,
    x: jax.Array,
    times: jax.typing.ArrayLike,
    carry: Carry = None,
    method: Method = "euler",
    start: int = 0,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, Carry]:
    """Carries x from `times[0]` to `times[-1]`.

    Interval i leads from t = times[i] to s = times[i + 1], and a step over it is

        euler:    x_s = x_t + (s - t) v(x_t, t)
        heun:     y   = x_t + (s - t) v(x_t, t),   x_s = x_t + (s - t) (v(x_t, t) + v(y, s)) / 2
        renoise:  x_0 = x_t - t v(x_t, t),         x_s = (1 - s) x_0 + s eps_i,   eps_i fresh

    The first two follow the flow, with global error O(h) and O(h^2) (Karras et al. 2022, algorithm 1). Heun calls
    `denoise` twice an interval, the second time at s with index i + 1 and the carry of the first call. The third is for
    networks that were trained to jump to the data in one step (Song et al. 2023, "Consistency Models", algorithm 1).

    The index that `denoise` receives is that of its time in `times`, counted from `start`: `grid.at(i, B)` of a
    schedule's grid is the level of the call.

    Calls chain: sampling over `times[: k + 1]` and then, with `start=k` and the carry of the first call, over
    `times[k:]` equals one call over `times`.
    Heun also evaluates the velocity at the last time. A network that predicts velocity is finite at t = 0, so nothing
    is special there; a `denoise` that divides by t can end with a chained Euler step.

    Args:
        denoise: `(x_t [B, ...], t [B] float32, i int32 scalar, carry) -> (v [B, ...], carry)`; `t = times[i - start]`.
        x: `[B, ...]` of any rank, the state at `times[0]`.
        times: `[S + 1]`, usually `time_grid(S)`; may run in either direction.
        carry: any tree that `denoise` reads and rewrites (cached activations, a recorded trajectory); its shapes and
            dtypes stay the same. Its leaves need not have the batch of x: under guidance activations have 2 B rows.
        start: the index of `times[0]` in the whole trajectory, as seen by `denoise` and in `noise`.
        noise: `[start + S, B, ...]` standard normal, "renoise" only: `noise[i]` is mixed in at the end of interval i,
            and not at all where that is 0.

    Returns:
        x: `[B, ...]` float32, the state at `times[-1]`.
        carry: as left by the last call of `denoise`.

    Raises:
        ValueError: the method is unknown, or is "renoise" and `noise` does not fit.
    """
    times = jnp.asarray(times, jnp.float32)

    def velocity(x, t, i, carry):
        v, carry = denoise(x, jnp.full(x.shape[:1], t), i, carry)
        return v.astype(jnp.float32), carry

    def euler(state, interval):
        x, carry = state
        i, t, s = interval
        v, carry = velocity(x, t, i, carry)
        return (x + (s - t) * v, carry), None

    def heun(state, interval):
        x, carry = state
        i, t, s = interval
        v_t, carry = velocity(x, t, i, carry)
        v_s, carry = velocity(x + (s - t) * v_t, s, i + 1, carry)
        return (x + (s - t) * (v_t + v_s) / 2, carry), None

    def renoise(state, interval):
        x, carry = state
        i, t, s = interval
        v, carry = velocity(x, t, i, carry)
        return ((1 - s) * (x - t * v) + s * jax.lax.dynamic_index_in_dim(noise, i, keepdims=False), carry), None

    steps = {"euler": euler, "heun": heun, "renoise": renoise}
    if method not in steps:
        raise ValueError(f"unknown sampling method {method!r}; expected one of {', '.join(steps)}")
    expected = (start + times.shape[0] - 1, *x.shape)
    if method == "renoise" and (noise is None or noise.shape != expected):
        given = "none" if noise is None else f"of shape {noise.shape}"
        raise ValueError(f"method 'renoise' needs noise of shape {expected}, one an interval; {given} was given")
    indices = start + jnp.arange(times.shape[0] - 1)
    state, _ = jax.lax.scan(steps[method], (x.astype(jnp.float32), carry), (indices, times[:-1], times[1:]))
    return state
