"""How a flow is sampled: the options of a call, the noise it begins with, and the loop over times."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import FINITE, above, at_least, check
from snapgen_jax.diffusion.guidance import ALL_TIMES, check_interval, guided_times, with_guidance
from snapgen_jax.diffusion.noise import standard_normal
from snapgen_jax.diffusion.samplers import Method, sample
from snapgen_jax.diffusion.schedules import Level, Schedule

Tree = Any
Condition = Any
Carry = Any
Denoise = Callable[[jax.Array, Level, jax.Array, Carry, Condition], tuple[jax.Array, Carry]]
"""`denoise(x_t [B, ...], level [B], i, carry, condition) -> (velocity, carry)`; `i` counts the times of the grid."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are made unless a call says otherwise.

    Attributes:
        steps: network evaluations, or half of them (Heun).
        guidance: scale w of classifier-free guidance; 1 is none.
        guidance_interval: (t_low, t_high): the times at which to guide, both ends included, on the grid as `shift` left
            it; (0, 1) for all. At the others the network is asked once, so that it also saves time. Much noise is where
            guidance narrows what is drawn, and little noise is where it changes nothing (arXiv 2404.07724).
        method: "euler" or "heun", or "renoise" for a network that jumps to the data; see `diffusion.samplers.sample`.
        shift: of the grid of times; see `shift_time`.
        times: those of the network's calls, from noise down, in place of an even grid of these steps and this shift:
            such as a few-step teacher was trained for. `steps` is then their number, and `shift` stays 1.
        image_size: (height, width) in pixels; None for the first image size of the inputs.
    """

    steps: int = 28
    guidance: float = 3.0
    guidance_interval: tuple[float, float] = ALL_TIMES
    method: Method = "euler"
    shift: float = 1.0
    times: tuple[float, ...] = ()
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check(self, steps=at_least(1), guidance=FINITE, shift=above(0), image_size=at_least(1))
        check_interval(self.guidance_interval)
        if not self.times:
            return
        if any(t <= s for t, s in zip(self.times, (*self.times[1:], 0.0), strict=True)) or self.times[0] > 1:
            raise ValueError(f"times={self.times}; give times that fall, the first at most 1 and the last above 0")
        if len(self.times) != self.steps or self.shift != 1:
            raise ValueError(
                f"steps={self.steps} and shift={self.shift} beside times={self.times}, which are {len(self.times)} "
                "steps and as they are; set steps to their number and shift to 1, or times to () for an even grid"
            )


def sampling_grid(schedule: Schedule, options: SamplingConfig) -> Level:
    """The levels that are sampled at, NumPy float32 `[steps + 1]`, from noise down to the data."""
    return schedule.grid_at(options.times) if options.times else schedule.grid(options.steps, options.shift)


def check_sampling(schedule: Schedule, options: SamplingConfig) -> None:
    """Raises `ValueError` where a schedule has no such grid: before training, not after it."""
    try:
        _guided_times(sampling_grid(schedule, options), options)
    except ValueError as error:
        raise ValueError(f"sampling: {error}") from error
    if options.times and schedule.kind == "flow" and options.times[0] != 1:
        raise ValueError(f"sampling.times={options.times}; a flow begins with noise alone: let the first time be 1")


def _guided_times(grid: Level, options: SamplingConfig) -> np.ndarray | None:
    """Which times of the grid are guided; None where there is no guidance at all."""
    return None if options.guidance == 1 else guided_times(np.asarray(grid.t), options.guidance_interval)


@functools.partial(jax.jit, static_argnums=1)
def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 `[B, *shape]`, each example from its own key.

    It is `diffusion.noise` of the key's first two words. A Threefry key has no more; one of "rbg" has two others, but
    keys that were split differ in the first two already.
    """
    words = jax.random.key_data(keys)
    return standard_normal(words[:, 0], words[:, 1], shape, jnp)


def noise_shape(latent: tuple[int, ...], options: SamplingConfig) -> tuple[int, ...]:
    """Of the noise that an example begins with, as its latent; or `(steps, *latent)`, the first and all that is mixed
    in later, where the method renoises."""
    return (options.steps, *latent) if options.method == "renoise" else latent


def sample_flow(
    denoise: Denoise,
    schedule: Schedule,
    noise: jax.Array,
    condition: Condition,
    null: Condition,
    options: SamplingConfig,
    carry: Carry = None,
) -> tuple[jax.Array, Carry]:
    """The `x_0` `[B, ...]` that noise leads to under guidance, and what the last call left in the carry.

    Args:
        denoise: of a batch that guidance may have doubled; see `with_guidance`.
        schedule: whose grid is walked. The network is told the grid's own levels, never one computed back from t.
        noise: float32 `[B, ...]` of `noise_shape`.
        condition: of B examples.
        null: of nothing, one for all.
        options: guidance and its times, method, and the grid.
        carry: what `denoise` reads and rewrites, such as cached activations.
    """
    x = first_state(schedule, noise, options)
    return sample_steps(denoise, schedule, x, (0, options.steps), noise, condition, null, options, carry)


def first_state(schedule: Schedule, noise: jax.Array, options: SamplingConfig) -> jax.Array:
    """Where sampling begins, `[B, ...]`, from noise `[B, ...]` of `noise_shape`."""
    first = noise[:, 0] if options.method == "renoise" else noise
    return schedule.initial(first, sampling_grid(schedule, options))


def sample_steps(
    denoise: Denoise,
    schedule: Schedule,
    x: jax.Array,
    steps: tuple[int, int],
    noise: jax.Array,
    condition: Condition,
    null: Condition,
    options: SamplingConfig,
    carry: Carry = None,
    remat: Literal["none", "steps"] = "none",
) -> tuple[jax.Array, Carry]:
    """Some steps of `sample_flow`; those of two calls one after the other are those of one.

    Args:
        denoise, schedule, noise, condition, null, options, carry: as for `sample_flow`.
        x: `[B, ...]`, the state before the first of the steps.
        steps: (first, last): the steps first, ..., last - 1 of the grid.
        remat: "steps" keeps the state before each step for the backward pass, and computes the step again there.
    """
    grid, (first, last) = sampling_grid(schedule, options), steps

    def at_grid(x_t: jax.Array, t: jax.Array, i: jax.Array, carry: Carry, c: Condition) -> tuple[jax.Array, Carry]:
        return denoise(x_t, grid.at(i, x_t.shape[0]), i, carry, c)

    guided = with_guidance(at_grid, condition, null, options.guidance, _guided_times(grid, options))
    if remat == "steps":
        guided = jax.checkpoint(guided, prevent_cse=False)  # a scan keeps the two computations apart
    later = None
    if options.method == "renoise":
        later = jnp.moveaxis(jnp.roll(noise, -1, axis=1), 1, 0)[:last]  # the last interval ends in data and uses none
    return sample(guided, x, grid.t[first : last + 1], carry, method=options.method, start=first, noise=later)


def own_states(
    denoise: Callable[[jax.Array, Level], jax.Array], schedule: Schedule, grid: Level, noise: jax.Array
) -> jax.Array:
    """Where a generator that renoises is at each time of a grid when it samples by itself: `x_t` `[S, B, ...]`.

    "Backward simulation" (Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis",
    section 4.5): in sampling each call but the first sees what the call before made, not noised data. `denoise` is
    called at all times but the last.

    Args:
        denoise: `(x_t [B, ...], level [B]) -> velocity [B, ...]`.
        schedule, grid: as in sampling.
        noise: `[B, S, ...]` standard normal: what it begins with, and what is mixed in later.
    """

    def recording(x_t: jax.Array, t: jax.Array, i: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        return denoise(x_t, grid.at(i, x_t.shape[0])), states.at[i].set(x_t)

    first, later = schedule.initial(noise[:, 0], grid), jnp.moveaxis(noise[:, 1:], 1, 0)
    states = jnp.zeros((noise.shape[1], *first.shape), jnp.float32)
    last, states = sample(recording, first, grid.t[:-1], states, method="renoise", noise=later)
    return states.at[-1].set(last)
