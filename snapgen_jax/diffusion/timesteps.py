"""Where in time flow matching trains and samples: timestep densities, the resolution shift, the grid of inference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from snapgen_jax.diffusion.schedules import FlowSchedule

ArrayT = TypeVar("ArrayT", float, np.ndarray, jax.Array)


def shift_time(t: ArrayT, shift: float) -> ArrayT:
    """Moves times towards noise: `t' = s t / (1 + (s - 1) t)`.

    An image of m pixels needs more noise than one of n pixels to be equally uncertain; s = sqrt(m / n) makes up for it
    (Esser et al. 2024, section 5.3.2, eq. 23). 0 and 1 stay where they are, s = 1 is the identity, and shifts compose
    by multiplication. Since the odds t / (1 - t) are multiplied by s, a shifted logit-normal density is logit-normal
    with its mean moved by log s.
    """
    return shift * t / (1 + (shift - 1) * t)


def sample_times(
    key: jax.Array, shape: tuple[int, ...], schedule: FlowSchedule, progress: float | jax.Array = 0.0
) -> jax.Array:
    """Draws training times from the density of a flow schedule, float32 of the given shape in [0, 1]; `progress` is the
    share of the run that is done."""
    match schedule.density:
        case "logit_normal":
            mean = schedule.mean
            if schedule.final_mean is not None:
                mean += progress * (schedule.final_mean - schedule.mean)
            t = jax.nn.sigmoid(mean + schedule.std * jax.random.normal(key, shape))
        case "uniform":
            t = jax.random.uniform(key, shape)
        case "power":
            t = jax.random.uniform(key, shape) ** (1 / schedule.density_power)
        case other:
            raise ValueError(f"unknown timestep density {other!r}; expected 'logit_normal', 'uniform' or 'power'")
    return shift_time(t, schedule.shift)


def logit_normal_density(t: jax.typing.ArrayLike, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Probability density of t when logit(t) ~ N(mean, std^2); 0 at both ends. float32, the shape of `t`.

        rho(t) = 1 / (std sqrt(2 pi) t (1 - t)) exp(-(logit(t) - mean)^2 / (2 std^2))

    Esser et al. 2024, section 3.1. For (0, 1) the maximum is 4 / sqrt(2 pi), at t = 1/2.
    """
    t = jnp.asarray(t, jnp.float32)
    inside = (t > 0) & (t < 1)
    t = jnp.where(inside, t, 0.5)  # keeps the gradient finite where the value is discarded
    log_t, log_1mt = jnp.log(t), jnp.log1p(-t)
    z = (log_t - log_1mt - mean) / std
    log_rho = -0.5 * jnp.square(z) - log_t - log_1mt - math.log(std * math.sqrt(2 * math.pi))
    return jnp.where(inside, jnp.exp(log_rho), 0.0)


def time_grid(steps: int, shift: float = 1.0) -> np.ndarray:
    """The times of inference: `[steps + 1]` float32 from 1 (noise) down to 0 (data), evenly spaced before the shift.

    NumPy and not JAX, so that a scheduler written to a file holds the very numbers that were sampled with.
    """
    if steps < 1:
        raise ValueError(f"a time grid needs at least one step, got {steps}")
    return shift_time(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)
