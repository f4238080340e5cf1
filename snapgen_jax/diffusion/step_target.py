"""The target of step distillation: one step of a student leads where several steps of its teacher do.

With t = sigma / (alpha + sigma) a DDIM step is the Euler step of the straight path, for every schedule. So the output
of a student that lands on the teacher's x_{t''} is the velocity of the line between the two points:

    u = (x_t - x_{t''}) / (t - t'')

In terms of the data this is SnapFusion's target, (z_{t''} - (sigma''/sigma) z_t) / (alpha'' - (sigma''/sigma) alpha)
(arXiv 2306.00980, eq. 8; Salimans and Ho 2022, appendix G): it is `x_t - t u`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.diffusion.path import expand_like
from snapgen_jax.diffusion.schedules import Level, Schedule

SAME_TIME = 1e-5  # times that differ by less are one


def mean_velocity(
    denoise: Callable[[jax.Array, Level], jax.Array], x_t: jax.Array, levels: Sequence[Level]
) -> jax.Array:
    """The velocity that leads in one step where a teacher's steps lead: u at the top of this file.

    Args:
        denoise: of the teacher: `(x_t [B, ...], level [B]) -> velocity [B, ...]`.
        x_t: `[B, ...]`, at the first level.
        levels: of `[B]`, from noise down; the teacher is asked at all but the last. Its program is there once, however
            many they are.
    """
    stacked = Level(*(jnp.stack(values) for values in zip(*levels, strict=True)))
    before, after = (Level(*(value[part] for value in stacked)) for part in (slice(None, -1), slice(1, None)))

    def step(x: jax.Array, ends: tuple[Level, Level]) -> tuple[jax.Array, None]:
        here, there = ends
        return x + expand_like(there.t - here.t, x) * denoise(x, here), None

    x, _ = jax.lax.scan(step, x_t, (before, after))
    return (x_t - x) / expand_like(levels[0].t - levels[-1].t, x)


def truncated_snr(level: Level) -> jax.Array:
    """The weight of the velocity's squared error by which that of x_0 has max(SNR, 1), of the shape of the level.

    The error of x_0 is t times that of the velocity, and SNR is (alpha / sigma)^2, so it is
    `max(alpha, sigma)^2 / (alpha + sigma)^2` (Salimans and Ho 2022, section 4; SnapFusion, eq. 7).
    """
    alpha, sigma = jnp.asarray(level.alpha), jnp.asarray(level.sigma)
    return jnp.square(jnp.maximum(alpha, sigma) / (alpha + sigma))


def nested_grid(schedule: Schedule, steps: int, shift: float, inner: int) -> Level:
    """The levels of a teacher that takes `inner` steps for each of a student's: NumPy float32 `[steps * inner + 1]`.

    Every `inner`-th of them is a level of the student's own grid.

    Args:
        schedule: of both.
        steps, shift: of the student's grid.
        inner: steps of the teacher for each of them.

    Raises:
        ValueError: the schedule spaces so many steps otherwise.
    """
    grid, coarse = schedule.grid(steps * inner, shift), schedule.grid(steps, shift)
    if not np.allclose(grid.t[::inner], coarse.t, rtol=0, atol=SAME_TIME):
        raise ValueError(
            f"the {steps} levels of {schedule!r} are not among its {steps * inner}, and a student's step must begin "
            "and end at levels of its teacher; set schedule.spacing to 'trailing'"
        )
    return grid
