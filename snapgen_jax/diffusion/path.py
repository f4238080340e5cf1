"""The probability path of rectified flow: a straight line from data at t = 0 to noise at t = 1.

    x_t = (1 - t) x_0 + t eps,    v = d x_t / d t = eps - x_0

Liu et al. 2022, "Flow Straight and Fast", section 2 (with time reversed, as in Esser et al. 2024, section 3).
Everywhere `t` is a scalar or `[B]`, and `x_0`, `eps`, `x_t` and `v` are `[B, ...]` of any rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

T_MIN = 0.04  # the smallest time by which `velocity_from_x0` divides


def expand_like(t: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """Appends axes of size one to `t` (scalar or `[B]`) until it broadcasts against `x` `[B, ...]`."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def interpolate(x_0: jax.Array, eps: jax.Array, t: jax.typing.ArrayLike) -> jax.Array:
    """The point of the path at time t: `x_t = (1 - t) x_0 + t eps`."""
    t = expand_like(t, x_0)
    return (1 - t) * x_0 + t * eps


def velocity(x_0: jax.Array, eps: jax.Array) -> jax.Array:
    """The velocity of the path, equal at every time: `v = eps - x_0`."""
    return eps - x_0


def x0_from_velocity(x_t: jax.Array, v: jax.Array, t: jax.typing.ArrayLike) -> jax.Array:
    """The data end of the line through `x_t` with velocity `v`: `x_0 = x_t - t v`."""
    return x_t - expand_like(t, x_t) * v


def eps_from_velocity(x_t: jax.Array, v: jax.Array, t: jax.typing.ArrayLike) -> jax.Array:
    """The noise end of the line through `x_t` with velocity `v`: `eps = x_t + (1 - t) v`."""
    return x_t + (1 - expand_like(t, x_t)) * v


def velocity_from_x0(x_t: jax.Array, x_0: jax.Array, t: jax.typing.ArrayLike, t_min: float = T_MIN) -> jax.Array:
    """The velocity of the line from a predicted `x_0` to `x_t`: `v = (x_t - x_0) / max(t, t_min)`.

    The bound keeps the error of a prediction from being magnified without end near the data (Li and He 2025, "Back to
    Basics: Let Denoising Generative Models Denoise", section 4).
    """
    return (x_t - x_0) / jnp.maximum(expand_like(t, x_t), t_min)
