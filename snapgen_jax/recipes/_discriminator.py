"""A discriminator: heads on a frozen trunk, which tell what is generated from the data.

    x_s = (1 - s) x_0 + s eps',   x~_s = (1 - s) x0^ + s eps'',   s < t
    L_D = hinge(D(x_s, s, c), D(x~_s, s, c)) + R1,   L_adv = -D(x~_s, s, c)

It sees both kinds of images again with noise (Xu et al. 2023, "UFOGen"), through a copy of the student or the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.diffusion.path import interpolate
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.losses.adversarial import gradient_penalty, hinge_discriminator_loss, hinge_generator_loss
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, frozen_spec
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.recipes._teacher import Teacher, tap_shapes
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Metrics
from snapgen_jax.weights.frozen import load_run

if TYPE_CHECKING:
    from snapgen_jax.recipes.adversarial import AdversarialConfig

Tree = Any
DISCRIMINATOR = "discriminator"


class Discriminator:
    """Heads and their trunk.

    Attributes:
        weight: of `generator_loss`.
        term: what that is called in the metrics.
        heads: the network that is trained.
        role: of the heads.
    """

    term, role = "adversarial", DISCRIMINATOR

    def __init__(
        self, config: AdversarialConfig, student: Denoiser, teacher: Teacher, size: tuple[int, ...], platform: Platform
    ):
        """`size` is the shape of a latent.

        Raises:
            ConfigError: the heads do not fit the trunk.
        """
        self.config, self.weight = config, config.adversarial_weight
        self.teacher = teacher if config.trunk == "teacher" else None
        self.student, self.trunk_role = student, f"trunk/{config.network.kind}"
        self.heads, _ = build(for_platform(config.discriminator, platform))
        self._check(size)

    def _check(self, size: tuple[int, ...]) -> None:
        heads = self.config.discriminator
        shapes = tap_shapes(self.student if self.teacher is None else self.teacher.denoiser, size, heads.taps)
        widths = tuple(shapes[tap][-1] for tap in heads.taps)
        pooled = self.config.network.pooled_width or 0
        if widths != heads.channels or pooled != heads.pooled_width:
            raise ConfigError(
                f"the trunk's features {heads.taps} have widths {widths} and the pooled text has {pooled}; set "
                f"discriminator.channels={widths} and discriminator.pooled_width={pooled}"
            )

    def networks(self) -> dict[str, Network]:
        """The heads, and the trunk unless that is the teacher: `{role: network}`."""
        return {self.role: self.heads, **({self.trunk_role: self.student.network} if self.teacher is None else {})}

    def load(self, mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the trunk, unless it is the teacher.

        Raises:
            ConfigError: no run is named.
        """
        config, kind = self.config, self.config.network.kind
        if self.teacher is not None:
            return {}
        if not (workdir := config.trunk_workdir or config.init_from):
            raise ConfigError(
                "the discriminator has no trunk: set init_from, or trunk_workdir, to the run it comes from"
            )
        rules = rules_of({kind: self.student.network}) if config.shard_student else ()
        read = load_run(workdir, {kind: frozen_spec(self.student.network)}, mesh=mesh, rules=rules)
        return {self.trunk_role: read[kind]}

    def draw(self, key: jax.Array, shape: tuple[int, ...], t: jax.Array, level: Level) -> Tree:
        """What is random about one look: the noise that it looks through, less than the generator's at times `t` `[B]`.

        Args:
            key: of this look alone.
            shape: of what is generated.
            t: the generator's times `[B]`.
            level: of the schedule's density; not used.
        """
        del level
        share, real, fake = jax.random.split(key, 3)
        logit = self.config.noise_mean + self.config.noise_std * jax.random.normal(share, t.shape)
        eps = {"real_eps": jax.random.normal(real, shape), "fake_eps": jax.random.normal(fake, shape)}
        return {"s": t * jax.nn.sigmoid(logit), **eps}

    def features(self, networks: Tree, x_s: jax.Array, s: jax.Array, condition: TextContext, drawn: Tree) -> Tree:
        """What the trunk makes of noisy latents `[B, h, w, c]`: `{tap: [B, h, w, C]}`."""
        if self.teacher is not None:
            trunk, weights = self.teacher.denoiser, self.teacher.params(networks)
            condition = self.teacher.condition(networks, drawn[self.teacher.name], condition)
        else:
            trunk, weights = self.student, networks[self.trunk_role]
        weights, condition = jax.lax.stop_gradient((weights, condition))
        return trunk(weights, x_s, s, condition, taps=self.config.discriminator.taps)[1]

    def judge(self, networks: Tree, features: Tree, s: jax.Array, condition: TextContext) -> Tree:
        """Logits of every depth, `{tap: [B, h, w]}`."""
        time = time_features(s, self.config.discriminator.time_width)
        pooled = jax.lax.stop_gradient(condition.pooled)
        return apply(self.heads, networks[self.role], features, time, pooled)

    def loss(self, networks: Tree, drawn: Tree, x_0: jax.Array, condition: TextContext) -> tuple[jax.Array, Metrics]:
        """The hinge over all depths, and R1; `x_0` is what is generated, the data are drawn."""
        look = drawn[DISCRIMINATOR]
        s = look["s"]
        real = self.features(networks, interpolate(drawn["x_0"], look["real_eps"], s), s, condition, drawn)
        fake = self.features(networks, interpolate(x_0, look["fake_eps"], s), s, condition, drawn)
        real_logits, fake_logits = (self.judge(networks, features, s, condition) for features in (real, fake))
        hinge = jnp.mean(
            jnp.stack([hinge_discriminator_loss(real_logits[tap], fake_logits[tap]) for tap in real_logits])
        )
        penalty = jnp.float32(0)
        if self.config.penalty_weight:
            penalty = jnp.mean(gradient_penalty(lambda features: self.judge(networks, features, s, condition), real))
        metrics = {"loss/discriminator": hinge, "penalty": penalty}
        for name, logits in (("real", real_logits), ("fake", fake_logits)):
            metrics[f"logits/{name}"] = jnp.mean(jnp.stack([x.mean() for x in logits.values()]))
        return hinge + self.config.penalty_weight * penalty, metrics

    def generator_loss(self, networks: Tree, drawn: Tree, x_0: jax.Array, condition: TextContext) -> jax.Array:
        """What the generator minimises against it, a mean of all depths: `[B]`."""
        look = drawn[DISCRIMINATOR]
        s = look["s"]
        features = self.features(networks, interpolate(x_0, look["fake_eps"], s), s, condition, drawn)
        logits = self.judge(networks, features, s, condition)
        return jnp.mean(jnp.stack([hinge_generator_loss(x) for x in logits.values()]), axis=0)
