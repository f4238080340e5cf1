"""What the output of a network stands for, and how it becomes the velocity of the straight path.

A schedule adds noise as `z = alpha x_0 + sigma eps`. Divided by `alpha + sigma` this is a point of the straight path:

    x_t = z / (alpha + sigma) = (1 - t) x_0 + t eps,   t = sigma / (alpha + sigma),   v = eps - x_0

Each native prediction is an affine function of v at a given `x_t` and level, so it can be turned into the velocity and
back. The formulas use the level's own alpha and sigma, never `1 - t`: near t = 1 a float32 `1 - t` has lost its digits.
They hold no function of JAX but `maximum`, and compute in the dtype of their arguments (float32, or float64 in tests).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.diffusion.path import expand_like, velocity_from_x0

Array = jax.Array | np.ndarray

Prediction = Literal["velocity", "x_0", "eps", "v", "F"]
"""What a network predicts, where a, s = (alpha, sigma) / sqrt(alpha^2 + sigma^2):

    velocity  eps - x_0, the velocity of the straight path
    x_0       the data
    eps       the noise
    v         a eps - s x_0 (Salimans & Ho 2022, section 4). Stable Video Diffusion predicts it under the EDM schedule,
              where it is -F for sigma_data = 1
    F         (x_0 - c_skip z) / c_out, the raw output of Karras et al. 2022 (eq. 7 and table 1); EDM only
"""


class Level(NamedTuple):
    """A noise level of a schedule; four arrays of one shape, `[B]` in a step or `[S + 1]` for a grid of S steps.

    Attributes:
        t: time of the straight path, `sigma / (alpha + sigma)`, from 0 (data) to 1 (noise).
        alpha, sigma: native scales of data and noise.
        time: the native time, which the network receives: t (flow), the step n (VP) or log(sigma) / 4 (EDM).
    """

    t: Array
    alpha: Array
    sigma: Array
    time: Array

    def at(self, i: jax.typing.ArrayLike, batch: int | None = None) -> Level:
        """The level with index `i` of a grid, for a batch.

        Args:
            i: index into the arrays: an int32 scalar, as `sample` gives it to `denoise`, or one an example `[B]`.
            batch: B; a scalar index then gives `[B]`. None keeps the shape of `i`.
        """
        chosen = [jnp.asarray(a)[jnp.asarray(i)] for a in self]
        return Level(*(chosen if batch is None else [jnp.broadcast_to(a, (batch,)) for a in chosen]))


def velocity_from(
    prediction: Prediction,
    output: jax.Array,
    x_t: jax.Array,
    level: Level,
    *,
    t_min: float = 0.0,
    data_min: float = 0.0,
    sigma_data: float = 1.0,
) -> jax.Array:
    """The velocity that a network's output stands for.

        x_0:  v = (x_t - x_0) / max(t, t_min)
        eps:  v = (eps - x_t) / max(alpha / r, data_min)                      with r = alpha + sigma
        v:    v = r ((sigma - alpha) x_t + h output) / h^2                    with h^2 = alpha^2 + sigma^2
        F:    v = r ((sigma - d^2) x_t / e^2 - d output / e)                  with d = sigma_data, e^2 = sigma^2 + d^2

    Args:
        prediction: what the output stands for.
        output: `[B, ...]`.
        x_t: `[B, ...]` point of the path, not scaled.
        level: of `[B]`.
        t_min, data_min: bounds of the two divisors, for schedules that reach the ends.
        sigma_data: standard deviation of the data, "F" only.

    Returns:
        `[B, ...]`, float32 where x_t is. "velocity" returns the output as it is.
    """
    if prediction == "velocity":
        return output
    if prediction == "x_0":
        return velocity_from_x0(x_t, output, level.t, t_min)
    alpha, sigma = expand_like(level.alpha, x_t), expand_like(level.sigma, x_t)
    r = alpha + sigma
    match prediction:
        case "eps":
            return (output - x_t) / jnp.maximum(alpha / r, data_min)
        case "v":
            h2 = alpha * alpha + sigma * sigma
            return r * ((sigma - alpha) * x_t + h2**0.5 * output) / h2
        case "F":
            e2 = sigma * sigma + sigma_data**2
            return r * ((sigma - sigma_data**2) * x_t / e2 - sigma_data * output / e2**0.5)
    raise unknown(prediction)


def output_from(
    prediction: Prediction, v: jax.Array, x_t: jax.Array, level: Level, *, sigma_data: float = 1.0
) -> jax.Array:
    """The output that stands for a velocity: the inverse of `velocity_from` without its bounds. The training target in
    native form is `output_from(prediction, eps - x_0, x_t, level)`."""
    if prediction == "velocity":
        return v
    if prediction == "x_0":
        return x_t - expand_like(level.t, x_t) * v
    alpha, sigma = expand_like(level.alpha, x_t), expand_like(level.sigma, x_t)
    r = alpha + sigma
    match prediction:
        case "eps":
            return x_t + alpha / r * v
        case "v":
            h = (alpha * alpha + sigma * sigma) ** 0.5
            return h / r * v - (sigma - alpha) * x_t / h
        case "F":
            e = (sigma * sigma + sigma_data**2) ** 0.5
            return ((sigma - sigma_data**2) * x_t / e - e * v / r) / sigma_data
    raise unknown(prediction)


def squared_error_weight(prediction: Prediction, level: Level, *, sigma_data: float = 1.0) -> Array:
    """The factor, of the shape of the level, by which the velocity's squared error becomes that of the prediction.

    It is the square of the slope of `output_from` in v: 1 for the velocity, t^2 for x_0, (alpha / r)^2 for eps,
    (h / r)^2 for v and (e / (d r))^2 for F. Where `velocity_from` applies a bound the two errors differ.
    """
    if prediction == "velocity":
        return jnp.ones_like(jnp.asarray(level.t))
    if prediction == "x_0":
        return jnp.square(level.t)
    alpha, sigma = jnp.asarray(level.alpha), jnp.asarray(level.sigma)
    r2 = (alpha + sigma) ** 2
    match prediction:
        case "eps":
            return alpha**2 / r2
        case "v":
            return (alpha**2 + sigma**2) / r2
        case "F":
            return (sigma**2 + sigma_data**2) / (sigma_data**2 * r2)
    raise unknown(prediction)


def unknown(prediction: str) -> ValueError:
    """The error about a prediction that does not exist."""
    return ValueError(f"unknown prediction {prediction!r}; choose 'velocity', 'x_0', 'eps', 'v' or 'F'")
