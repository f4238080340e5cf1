"""Noise schedules: how much noise there is in training and at each step of sampling, and what the network is told.

There is one sampler and one time: t runs from 0 (data) to 1 (noise) along `x_t = (1 - t) x_0 + t eps`. A model that was
trained otherwise, on `z = alpha x_0 + sigma eps`, is asked through its schedule:

    t = sigma / (alpha + sigma),   x_t = z / (alpha + sigma)

A DDIM step in z (Song et al. 2021, eq. 12, eta = 0) is then exactly the Euler step in x_t, for every schedule. What a
`Level` holds comes from one table in float64; a native time is never computed back from t where there is a table.

    schedule = VPSchedule.preset("sd15")
    grid = schedule.grid(50)                                     # Level of [51] NumPy arrays
    def denoise(x_t, t, i, carry):
        level = grid.at(i, x_t.shape[0])                         # Level of [B]
        output = network(schedule.network_input(x_t, level), level.time)
        return schedule.velocity(output, x_t, level, "eps"), carry
    x_0, _ = sample(denoise, schedule.initial(noise, grid), grid.t)
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import FINITE, above, at_least, check
from snapgen_jax.diffusion import predictions
from snapgen_jax.diffusion.betas import Betas, Spacing, alphas, sampled_steps
from snapgen_jax.diffusion.path import T_MIN, expand_like
from snapgen_jax.diffusion.predictions import Array
from snapgen_jax.diffusion.predictions import Level as Level
from snapgen_jax.diffusion.predictions import Prediction as Prediction
from snapgen_jax.diffusion.timesteps import sample_times, time_grid

JUST_BELOW = 1 - 1e-6  # a bound at a schedule's last level, below which its rounding does not fall


class _Bounds(NamedTuple):
    """Keyword arguments of `velocity_from`."""

    t_min: float
    data_min: float
    sigma_data: float = 1.0


class BaseSchedule(abc.ABC):
    """What every schedule offers. The schedules are frozen dataclasses, hashable, told apart by their field `kind`."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    predictions: ClassVar[tuple[Prediction, ...]]  # what a network may predict under it
    time_scale: ClassVar[float] = 1.0  # time features are of `time_scale * level.time`
    network_fields: ClassVar[tuple[str, ...]] = ()  # those that decide what a network is told and given at a level

    @classmethod
    def preset(cls, name: str) -> Self:
        """The schedule of a published model."""
        if name not in cls.PRESETS:
            known = ", ".join(cls.PRESETS) or "none"
            raise ValueError(f"unknown preset {name!r} of {cls.__name__}; there are: {known}")
        return cls(**cls.PRESETS[name])

    @abc.abstractmethod
    def draw(self, key: jax.Array, shape: tuple[int, ...], progress: float | jax.Array = 0.0) -> Level:
        """Levels of training, float32 of the given shape; `progress` is the share of the run that is done."""

    @abc.abstractmethod
    def level(self, t: jax.typing.ArrayLike) -> Level:
        """Levels at given times of the path, of the shape of t: NumPy arrays, computed in float64 and stored in
        float32, where t is a number or a NumPy array; else traced, in the dtype of t."""

    @abc.abstractmethod
    def grid(self, steps: int, shift: float = 1.0) -> Level:
        """Levels of sampling: NumPy float32 `[steps + 1]`, from noise down to the data (t = 0)."""

    def grid_at(self, times: Sequence[float]) -> Level:
        """Levels of sampling at given times of the path, those of the network's calls: NumPy float32 `[S + 1]`, from
        noise down, and then the data (t = 0). The native times are those of `level`."""
        return self.level(np.append(np.asarray(times, np.float32), np.float32(0)))

    @abc.abstractmethod
    def network_input(self, x_t: jax.Array, level: Level) -> jax.Array:
        """What the network receives for `x_t` `[B, ...]`: z, scaled as in its training."""

    @abc.abstractmethod
    def initial(self, noise: jax.Array, grid: Level) -> jax.Array:
        """The state `[B, ...]` at the first level of a grid, from standard normal noise of that shape."""

    @abc.abstractmethod
    def _bounds(self) -> _Bounds:
        """Where the conversions stop to divide by less."""

    def velocity(self, output: jax.Array, x_t: jax.Array, level: Level, prediction: Prediction) -> jax.Array:
        """The velocity `[B, ...]` that a network's output at `x_t` stands for; see `predictions.velocity_from`."""
        self.check(prediction)
        return predictions.velocity_from(prediction, output, x_t, level, **self._bounds()._asdict())

    def output(self, v: jax.Array, x_t: jax.Array, level: Level, prediction: Prediction) -> jax.Array:
        """The output `[B, ...]` that stands for a velocity at `x_t`; see `predictions.output_from`."""
        self.check(prediction)
        return predictions.output_from(prediction, v, x_t, level, sigma_data=self._bounds().sigma_data)

    def loss_weight(self, level: Level, prediction: Prediction) -> Array:
        """The factor that turns the velocity's squared error into that of the prediction, of the level's shape."""
        self.check(prediction)
        return predictions.squared_error_weight(prediction, level, sigma_data=self._bounds().sigma_data)

    def check(self, prediction: str) -> None:
        """Raises ValueError if a network cannot predict that under this schedule."""
        if prediction not in self.predictions:
            raise ValueError(
                f"a network cannot predict {prediction!r} under {self!r}; choose one of {', '.join(self.predictions)}"
            )


@dataclasses.dataclass(frozen=True)
class FlowSchedule(BaseSchedule):
    """Rectified flow: alpha = 1 - t, sigma = t; the network is told t. The fields are the density of training times.

    Attributes:
        density: "logit_normal" (Esser et al. 2024, section 3.1), "uniform" on [0, 1], or "power".
        mean: mean of logit(t) before the shift; logit_normal only. Positive values favour noise.
        std: standard deviation of logit(t); logit_normal only.
        density_power: power only: a of t = U^(1/a), which is Beta(a, 1); see `VPSchedule`.
        shift: s of `shift_time`, applied to the drawn times. 1 changes nothing.
        final_mean: the mean at the end of the run, reached linearly; None to stay. The layout of a picture is decided
            at high noise and its details at low noise, so that a run may learn the layout first.
    """

    kind: Literal["flow"] = "flow"
    density: Literal["logit_normal", "uniform", "power"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    density_power: float = 3.0
    shift: float = 1.0
    final_mean: float | None = None

    predictions: ClassVar[tuple[Prediction, ...]] = ("velocity", "x_0", "eps", "v")
    time_scale: ClassVar[float] = 1000.0

    def __post_init__(self) -> None:
        check(self, mean=FINITE, std=at_least(0), shift=above(0), final_mean=FINITE)
        check(self, density_power=above(0))

    def draw(self, key: jax.Array, shape: tuple[int, ...], progress: float | jax.Array = 0.0) -> Level:
        """As `BaseSchedule.draw`, by `sample_times`."""
        return self.level(sample_times(key, shape, self, progress))

    def level(self, t: jax.typing.ArrayLike) -> Level:
        """As `BaseSchedule.level`; exact."""
        if isinstance(t, jax.Array):
            return Level(t, 1 - t, t, t)
        t = np.asarray(t, np.float64)
        return _stored(t, 1 - t, t, t)

    def grid(self, steps: int, shift: float = 1.0) -> Level:
        """As `BaseSchedule.grid`: `time_grid(steps, shift)`. The schedule's own shift is that of training."""
        t = time_grid(steps, shift)
        return _stored(t, 1 - t.astype(np.float64), t, t)

    def network_input(self, x_t: jax.Array, level: Level) -> jax.Array:
        """`x_t` itself."""
        del level
        return x_t

    def initial(self, noise: jax.Array, grid: Level) -> jax.Array:
        """The noise itself."""
        del grid
        return noise

    def _bounds(self) -> _Bounds:
        return _Bounds(T_MIN, T_MIN)


@dataclasses.dataclass(frozen=True)
class VPSchedule(BaseSchedule):
    """A discrete variance-preserving schedule (DDPM): alpha^2 + sigma^2 = 1, and the network is told the step n.

    The defaults are those of Stable Diffusion 1.5. `grid` ends in the data, alpha = 1, where some public schedulers end
    in step 0 (`set_alpha_to_one=False`).

    Attributes:
        betas, beta_start, beta_end, native_steps, zero_terminal_snr: see `betas.alphas`.
        spacing, steps_offset: of the grid; see `betas.sampled_steps`.
        density_power: training steps are `floor(native_steps * U^(1 / density_power))`, U uniform: 1 is uniform, a is
            Beta(a, 1), which favours noise (BitsFusion, Sui et al. 2024, section 5, has a = 3).
    """

    kind: Literal["vp"] = "vp"
    betas: Betas = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    native_steps: int = 1000
    zero_terminal_snr: bool = False
    spacing: Spacing = "leading"
    steps_offset: int = 1
    density_power: float = 1.0

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd15": {},
        "zero_snr": {"zero_terminal_snr": True, "spacing": "trailing"},  # Lin et al. 2024; HyperHuman
        "dit": {"betas": "linear", "beta_start": 1e-4, "beta_end": 0.02, "spacing": "linspace"},
        "cosine": {"betas": "cosine", "spacing": "linspace"},
    }
    network_fields = ("betas", "beta_start", "beta_end", "native_steps", "zero_terminal_snr")
    predictions: ClassVar[tuple[Prediction, ...]] = ("velocity", "x_0", "eps", "v")

    def __post_init__(self):
        if self.native_steps < 2 or self.density_power <= 0:
            raise ValueError(
                f"native_steps is {self.native_steps} and must be at least 2; density_power is {self.density_power} "
                "and must be positive"
            )

    def check(self, prediction: str) -> None:
        """As `BaseSchedule.check`. With zero terminal SNR the noise says nothing of the data at the last step."""
        super().check(prediction)
        if prediction == "eps" and self.zero_terminal_snr:
            raise ValueError(
                "with zero_terminal_snr the last step has alpha = 0, where eps gives no x_0; predict 'v' or 'x_0'"
            )

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma of every native step, float64 `[native_steps]`. Read only."""
        return _vp_table(self)

    def at_step(self, n: jax.typing.ArrayLike) -> Level:
        """The levels of native steps n, integers of any shape: NumPy arrays or traced, as n is."""
        alpha, sigma = self.table()
        stored = _stored(sigma / (alpha + sigma), alpha, sigma, np.arange(self.native_steps))
        if isinstance(n, jax.Array):
            return Level(*(jnp.asarray(a)[n] for a in stored))
        return Level(*(np.asarray(a)[np.asarray(n)] for a in stored))

    def draw(self, key: jax.Array, shape: tuple[int, ...], progress: float | jax.Array = 0.0) -> Level:
        """As `BaseSchedule.draw`: native steps, whatever the progress."""
        del progress
        u = jax.random.uniform(key, shape) ** (1 / self.density_power)
        return self.at_step(jnp.minimum((self.native_steps * u).astype(jnp.int32), self.native_steps - 1))

    def level(self, t: jax.typing.ArrayLike) -> Level:
        """As `BaseSchedule.level`. alpha and sigma are exact; the native time is interpolated linearly in t between
        steps, hence no integer, and stays at the first or last step beyond the table. Use `grid` or `at_step` for a
        network that was only told integers."""
        alpha, sigma = self.table()
        times, steps = sigma / (alpha + sigma), np.arange(self.native_steps, dtype=np.float64)
        if isinstance(t, jax.Array):
            h = jnp.sqrt((1 - t) ** 2 + t**2)
            return Level(t, (1 - t) / h, t / h, jnp.interp(t, jnp.asarray(times, t.dtype), jnp.asarray(steps, t.dtype)))
        t = np.asarray(t, np.float64)
        h = np.sqrt((1 - t) ** 2 + t**2)
        return _stored(t, (1 - t) / h, t / h, np.interp(t, times, steps))

    def grid(self, steps: int, shift: float = 1.0) -> Level:
        """As `BaseSchedule.grid`. Asked at its end (Heun), the network is told step 0.

        Raises:
            ValueError: the schedule has not so many steps, or `shift` is not 1.
        """
        _no_shift(shift, "vp", "spacing decides its steps")
        n = sampled_steps(self.spacing, self.steps_offset, steps, self.native_steps)
        alpha, sigma = (a[n] for a in self.table())
        end = [sigma / (alpha + sigma), alpha, sigma, n]
        return _stored(*(np.append(a, last) for a, last in zip(end, (0, 1, 0, 0), strict=True)))

    def network_input(self, x_t: jax.Array, level: Level) -> jax.Array:
        """`z = (alpha + sigma) x_t`."""
        return x_t * expand_like(jnp.add(level.alpha, level.sigma), x_t)

    def initial(self, noise: jax.Array, grid: Level) -> jax.Array:
        """`z` is the noise, of variance 1."""
        return noise / float(np.asarray(grid.alpha)[0] + np.asarray(grid.sigma)[0])

    def _bounds(self) -> _Bounds:
        alpha, sigma = self.table()
        r = alpha + sigma
        return _Bounds(float(JUST_BELOW * sigma[0] / r[0]), float(JUST_BELOW * alpha[-1] / r[-1]))


@dataclasses.dataclass(frozen=True)
class EDMSchedule(BaseSchedule):
    """The schedule of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".

    alpha = 1. The network receives `c_in z`, where `c_in = 1 / sqrt(sigma^2 + sigma_data^2)`, and is told
    `log(sigma) / 4`. Its raw output is "F" (table 1); that of Stable Video Diffusion is "v".

    Attributes:
        density: of training: "lognormal", `log(sigma) ~ N(mean, std^2)`; "discrete_lognormal", the same on the Karras
            levels 1 to `levels` - 1, each with the mass between itself and the level below; "levels", each of those
            levels alike. SF-V (Zhang et al. 2024) has the second for its discriminator (mean -1, std 1, 1000 levels)
            and the third for its generator (4 levels).
        mean, std: of log(sigma); P_mean and P_std.
        levels: Karras levels of a discrete density; level 0 is `sigma_min` and never drawn.
        sigma_data: standard deviation of the data.
        sigma_min, sigma_max, rho: of the Karras levels (eq. 5).
    """

    kind: Literal["edm"] = "edm"
    density: Literal["lognormal", "discrete_lognormal", "levels"] = "lognormal"
    mean: float = -1.2
    std: float = 1.2
    levels: int = 1000
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "edm": {},
        "svd": {"sigma_data": 1.0, "sigma_max": 700.0},  # the density of its training is left to the config
    }
    network_fields = ("sigma_data",)
    predictions: ClassVar[tuple[Prediction, ...]] = ("velocity", "x_0", "eps", "v", "F")

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max or self.sigma_data <= 0 or self.std <= 0 or self.levels < 2:
            raise ValueError(f"{self!r}: needs 0 < sigma_min < sigma_max, positive sigma_data and std, levels >= 2")

    def karras_levels(self, count: int) -> np.ndarray:
        """sigma of `count` levels, float64, rising from `sigma_min` to `sigma_max`; one level is `sigma_max`.

        sigma_i = (min^(1/rho) + i / (count - 1) (max^(1/rho) - min^(1/rho)))^rho
        """
        low, high = (s ** (1 / self.rho) for s in (self.sigma_min, self.sigma_max))
        sigma = (low + np.linspace(0, 1, count) * (high - low)) ** self.rho
        sigma[0], sigma[-1] = self.sigma_min, self.sigma_max
        return sigma

    def level_probabilities(self) -> np.ndarray:
        """Of levels 1 to `levels` - 1 under a discrete density, float64 `[levels - 1]`."""
        if self.density == "levels":
            return np.full(self.levels - 1, 1 / (self.levels - 1))
        z = (np.log(self.karras_levels(self.levels)) - self.mean) / (self.std * math.sqrt(2))
        mass = np.diff([math.erf(a) for a in z])
        return mass / mass.sum()

    def draw(self, key: jax.Array, shape: tuple[int, ...], progress: float | jax.Array = 0.0) -> Level:
        """As `BaseSchedule.draw`, whatever the progress."""
        del progress
        match self.density:
            case "lognormal":
                log_sigma = self.mean + self.std * jax.random.normal(key, shape)
                sigma = jnp.exp(log_sigma)
                return Level(sigma / (1 + sigma), jnp.ones_like(sigma), sigma, log_sigma / 4)
            case "discrete_lognormal" | "levels":
                table = self._at(self.karras_levels(self.levels)[1:])
                i = jax.random.choice(key, self.levels - 1, shape, p=jnp.asarray(self.level_probabilities()))
                return table.at(i)
            case other:
                raise ValueError(f"unknown density {other!r}; choose 'lognormal', 'discrete_lognormal' or 'levels'")

    def level(self, t: jax.typing.ArrayLike) -> Level:
        """As `BaseSchedule.level`: `sigma = t / (1 - t)`, exact up to `sigma_max`, which stands for all times beyond.
        The time at t = 0 is that of `sigma_min`. A traced float32 t holds a sigma of 700 to 4e-5 of its value; use
        `grid` or `draw` there."""
        rest = 1 / (1 + self.sigma_max)
        if isinstance(t, jax.Array):
            sigma = jnp.minimum(t / jnp.maximum(1 - t, rest), self.sigma_max)
            return Level(t, jnp.ones_like(t), sigma, jnp.log(jnp.maximum(sigma, self.sigma_min)) / 4)
        t = np.asarray(t, np.float64)
        sigma = np.minimum(t / np.maximum(1 - t, rest), self.sigma_max)
        return _stored(t, np.ones_like(t), sigma, np.log(np.maximum(sigma, self.sigma_min)) / 4)

    def grid(self, steps: int, shift: float = 1.0) -> Level:
        """As `BaseSchedule.grid`: the Karras levels from `sigma_max` to `sigma_min`, then 0. Asked at its end (Heun),
        the network is told the time of `sigma_min`.

        Raises:
            ValueError: there is no step, or `shift` is not 1.
        """
        _no_shift(shift, "edm", "sigma_min, sigma_max and rho decide its steps")
        if steps < 1:
            raise ValueError(f"a grid needs at least one step, got {steps}")
        return self._at(np.append(self.karras_levels(steps)[::-1], 0.0))

    def network_input(self, x_t: jax.Array, level: Level) -> jax.Array:
        """`c_in z = x_t (1 + sigma) / sqrt(sigma^2 + sigma_data^2)`."""
        sigma = jnp.asarray(level.sigma)
        return x_t * expand_like((1 + sigma) / jnp.sqrt(sigma**2 + self.sigma_data**2), x_t)

    def initial(self, noise: jax.Array, grid: Level) -> jax.Array:
        """`z = sigma noise`."""
        return noise * float(np.asarray(grid.t)[0])

    def _at(self, sigma: np.ndarray) -> Level:
        time = np.log(np.maximum(sigma, self.sigma_min)) / 4
        return _stored(sigma / (1 + sigma), np.ones_like(sigma), sigma, time)

    def _bounds(self) -> _Bounds:
        return _Bounds(JUST_BELOW * self.sigma_min / (1 + self.sigma_min), 0.0, self.sigma_data)


Schedule = FlowSchedule | VPSchedule | EDMSchedule


@functools.lru_cache(maxsize=16)
def _vp_table(schedule: VPSchedule) -> tuple[np.ndarray, np.ndarray]:
    alpha = alphas(
        schedule.betas,
        schedule.beta_start,
        schedule.beta_end,
        schedule.native_steps,
        schedule.zero_terminal_snr,
    )
    sigma = np.sqrt(1 - alpha**2)
    alpha.flags.writeable = sigma.flags.writeable = False
    return alpha, sigma


def _stored(*arrays: np.ndarray) -> Level:
    return Level(*(np.asarray(a, np.float32) for a in arrays))


def _no_shift(shift: float, kind: str, why: str) -> None:
    if shift != 1:
        raise ValueError(f"shift = {shift}: a schedule of kind {kind!r} has none, {why}; leave shift at 1")
