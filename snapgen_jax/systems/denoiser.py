"""A denoiser: a network, the schedule that it was trained with and what it predicts, asked for the path's velocity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.diffusion.schedules import FlowSchedule, Level, Prediction, Schedule
from snapgen_jax.networks.module import Network, apply
from snapgen_jax.networks.time_features import time_features

Tree = Any


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """See the top of this file. Hashable, holds no array.

    Attributes:
        network: takes `(x, time features, context)` and returns its output and taps; its config has `time_width`.
        prediction: what its output stands for.
        schedule: how it was trained; scales its input and tells it the time.

    Raises:
        ValueError: the prediction does not exist under the schedule.
    """

    network: Network
    prediction: Prediction = "velocity"
    schedule: Schedule = FlowSchedule()

    def __post_init__(self):
        self.schedule.check(self.prediction)

    def __call__(
        self,
        params: Tree,
        x_t: jax.Array,
        level: Level | jax.Array,
        context: Any,
        *,
        taps: Sequence[str] = (),
        reuse: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The velocity, and the named intermediates of the network.

        Args:
            params: of the network.
            x_t: `[B, ...]` point of the straight path.
            level: of `[B]`; a bare array of times t `[B]` means `schedule.level(t)`.
            context: what the network attends to.
            taps: names of intermediates to return.
            reuse: intermediates to use in place of the network's own.
            options: further keyword arguments of the network, such as block masks.

        Returns:
            v: `[B, ...]`, the velocity of the straight path whatever the network predicts.
            intermediates: `{name: array}`.
        """
        if not isinstance(level, Level):
            level = self.schedule.level(level)
        if reuse is not None:
            options["reuse"] = reuse
        schedule = self.schedule
        features = time_features(jnp.asarray(level.time), self.network.config.time_width, schedule.time_scale)
        x = schedule.network_input(x_t, level)
        output, intermediates = apply(self.network, params, x, features, context, taps=taps, **options)
        return schedule.velocity(output, x_t, level, self.prediction), intermediates
