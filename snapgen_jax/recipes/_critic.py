"""A critic: a network that follows what a generator makes, to be compared with a teacher that knows the data.

    x_tau = (1 - tau) x0^ + tau eps,   tau in [0.02, 0.98]
    L_critic = || v_critic(x_tau, tau, c) - (eps - x0^) ||^2
    d L_match / d x0^ ~ x_0(v_critic) - x_0(v_T),   x_0(v) = x_tau - tau v

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis" (DMD2). The teacher is asked for
its score, and so is a full-step one; it is guided, the critic is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.diffusion.path import interpolate, velocity, x0_from_velocity
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.losses.distribution_matching import distribution_matching_loss
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.module import Network
from snapgen_jax.recipes._teacher import Teacher
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Metrics

Tree = Any


class Critic:
    """A critic of the generator's architecture, and the teacher whose score it is compared with.

    Attributes:
        weight: of `generator_loss`.
        term: what that is called in the metrics.
        denoiser: as the generator's.
        role: of the critic's network.
        score: the teacher.
    """

    term = "matching"

    def __init__(
        self,
        weight: float,
        times: tuple[float, float],
        denoiser: Denoiser,
        role: str,
        score: Teacher,
        time_weight: Callable[[Level], jax.Array | float],
    ):
        """`times` bound tau, and `time_weight` is that of the squared error of the velocity.

        Raises:
            ConfigError: the teacher has no score to ask for, or `times` are no bounds.
        """
        if not 0 <= times[0] < times[1] <= 1:
            raise ConfigError(f"critic_times={times}; give a lower and an upper bound within [0, 1]")
        self.weight, self.times, self.denoiser, self.score, self.time_weight = (
            weight,
            times,
            denoiser,
            score,
            time_weight,
        )
        self.role = f"critic/{role}"
        self._check()

    def _check(self) -> None:
        config, name = self.score.config, self.score.name
        if config.few_step_times:
            raise ConfigError(
                f"{name}.few_step_times={config.few_step_times}: a few-step teacher jumps to the data, and its "
                "velocity is no score for the critic to be compared with; set score_teacher to a full-step one, or "
                "critic_weight to 0"
            )
        if config.rollout_steps > 1:
            raise ConfigError(
                f"{name}.rollout_steps={config.rollout_steps} asks the teacher where its flow ends, which is no score "
                "for the critic to be compared with; set score_teacher to one with rollout_steps=1, or critic_weight "
                "to 0"
            )
        if self.score.has_own_latents:
            raise ConfigError(f"the critic sees the student's latents; leave 'latent' out of {name}.takes")

    def networks(self) -> dict[str, Network]:
        """Its own: `{role: network}`."""
        return {self.role: self.denoiser.network}

    def draw(self, key: jax.Array, shape: tuple[int, ...], t: jax.Array, level: Level) -> Tree:
        """What is random about one look: noise, and its level within the bounds.

        Args:
            key: of this look alone: where the critic was trained a moment ago it knows the answer.
            shape: of what is generated.
            t: the generator's times; not used.
            level: of the schedule's density, `[B]`.
        """
        del t
        bounded = self.denoiser.schedule.level(jnp.clip(level.t, *self.times))
        inside = (level.t >= self.times[0]) & (level.t <= self.times[1])
        level = Level(*(jnp.where(inside, a, b) for a, b in zip(level, bounded, strict=True)))
        return {"level": level, "eps": jax.random.normal(key, shape)}

    def velocity(self, networks: Tree, x_t: jax.Array, level: Level, condition: Any) -> jax.Array:
        """The critic's velocity `[B, ...]`."""
        return self.denoiser(networks[self.role], x_t, level, condition)[0]

    def loss(self, networks: Tree, drawn: Tree, x_0: jax.Array, condition: Any) -> tuple[jax.Array, Metrics]:
        """Flow matching of what is generated, weighed in time as the student's is of the data."""
        level, eps = drawn["critic"]["level"], drawn["critic"]["eps"]
        v = self.velocity(networks, interpolate(x_0, eps, level.t), level, condition)
        loss = jnp.mean(flow_matching_loss(v, velocity(x_0, eps)) * self.time_weight(level))
        return loss, {"loss/critic": loss}

    def generator_loss(self, networks: Tree, drawn: Tree, x_0: jax.Array, condition: Any) -> jax.Array:
        """Distribution matching of what is generated, `[B]`."""
        level = drawn["critic"]["level"]
        x_t = interpolate(x_0, drawn["critic"]["eps"], level.t)
        x_t, networks, asked = jax.lax.stop_gradient((x_t, networks, condition))
        v_critic = self.velocity(networks, x_t, level, asked)
        v_teacher, _ = self.score.ask(networks, drawn[self.score.name], x_t, level, asked)
        critic, teacher = (x0_from_velocity(x_t, v, level.t) for v in (v_critic, v_teacher))
        return distribution_matching_loss(x_0, critic, teacher)
