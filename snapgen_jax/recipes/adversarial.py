"""Adversarial step distillation: a generator that makes the image in four steps, or eight.

    x0^ = x_t - t v_theta(x_t, t, c),   t one of the few times of sampling
    x_s = (1-s) x_0 + s eps',   x~_s = (1-s) x0^ + s eps'',   s < t
    min_G max_D  hinge(D(x_s, s, c), D(x~_s, s, c)) + S(L_task, L_kd)

SnapGen (arXiv 2412.09619, section 3.4), as a diffusion GAN (Xu et al. 2023, "UFOGen"): the discriminator sees both
kinds of images again with noise, and is heads on a frozen trunk, a copy of the student or the teacher. Sampling jumps
to x0^ and back to the next time with fresh noise, without guidance. Two players step in turn within one update:
"discriminator", which holds the heads, then "model", the generator. An optional third, "critic", follows what is
generated for distribution matching (Yin et al. 2024, "DMD2"; K-DMD of SnapGen++, arXiv 2601.08303); it steps once for
each step of the generator, where those papers let it step five times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.bounds import FINITE, above, at_least, check
from snapgen_jax.diffusion.path import expand_like, interpolate, velocity, x0_from_velocity
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.inputs.interfaces import prefixed
from snapgen_jax.losses.adversarial import gradient_penalty, hinge_discriminator_loss, hinge_generator_loss
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, frozen_spec, init
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes._teacher import tap_shapes
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import Metrics, Part, Use
from snapgen_jax.training.state import Player, TrainState
from snapgen_jax.weights.frozen import load_run

Tree = Any
DISCRIMINATOR = "discriminator"


@dataclasses.dataclass(frozen=True)
class AdversarialConfig(DistillationConfig):
    """Distillation, and how a generator of few steps is trained.

    `sampling.steps` and `sampling.shift` are the times at which the generator is trained; its method is "renoise" and
    its guidance 1.

    Attributes:
        trunk: what the discriminator looks through: a frozen copy of the student, or the teacher. It reads the text as
            the generator does: a text encoder that is trained beside the generator changes what the trunk says, unless
            the trunk is a teacher with a text encoder of its own.
        trunk_workdir: the run of that copy; "" for `init_from`. Its network has the student's architecture.
        init_from: of the experiment: the run that the generator starts from.
        discriminator: its heads; `taps` are features of the trunk.
        discriminator_optimizer: of the heads, and of the critic.
        adversarial_weight: of the generator's adversarial loss; 0 leaves it and the discriminator out.
        penalty_weight: of R1 on the features of the data, which counts every cell; that of "Adversarial Diffusion
            Distillation", section 4.
        noise_mean, noise_std: of logit(s / t), where s < t is the noise that the discriminator looks through.
        critic_weight: of the distribution matching loss; 0 leaves it and the critic out. Needs a teacher that is asked
            for its velocity, not for where its flow ends (`teacher.rollout_steps`).
    """

    trunk: Literal["student", "teacher"] = "student"
    trunk_workdir: str = ""
    init_from: str = ""
    discriminator: DiscriminatorConfig = DiscriminatorConfig.preset("shapes")
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, b1=0.0, b2=0.99, warmup_steps=0)
    adversarial_weight: float = 0.1
    penalty_weight: float = 1e-5
    noise_mean: float = 0.0
    noise_std: float = 1.0
    critic_weight: float = 0.0
    feature_weight: float = 0.0
    sampling: SamplingConfig = SamplingConfig(steps=4, guidance=1.0, method="renoise", shift=3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, adversarial_weight=at_least(0), penalty_weight=at_least(0), critic_weight=at_least(0))
        check(self, noise_mean=FINITE, noise_std=above(0))


class Adversarial(Distillation):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = AdversarialConfig

    def __init__(self, config: AdversarialConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the heads do not fit the trunk, sampling is not the generator's, or the teacher is not what is
                needed.
        """
        super().__init__(config, platform)
        sampling = config.sampling
        grid = config.schedule.grid(sampling.steps, sampling.shift)
        # At other times the generator is never asked.
        self.levels = self.validation_levels = Level(*(value[:-1] for value in grid))
        self.discriminator, _ = build(for_platform(config.discriminator, platform))
        self.discriminator_optimizer = make_optimizer(config.discriminator_optimizer, config.train_steps)
        players = dict(self.trains)
        if config.adversarial_weight:
            players["discriminator"] = (DISCRIMINATOR,)
        if config.critic_weight:
            players["critic"] = (f"critic/{self.role}",)
        self.trains = players
        self._check_method()
        self._check_heads()

    def _check_method(self) -> None:
        config: AdversarialConfig = self.config
        if config.sampling.method != "renoise":
            raise ConfigError(
                f"sampling.method={config.sampling.method!r} does not jump to the data, as this generator learns to; "
                "set it to 'renoise'"
            )
        if config.sampling.guidance != 1:
            raise ConfigError(
                f"sampling.guidance={config.sampling.guidance} asks the generator twice at each time, where it learns "
                "to be asked once; set it to 1, and teacher.guidance to what it is to learn"
            )
        adversary = config.adversarial_weight and config.trunk == "teacher"
        if (config.critic_weight or adversary) and not self.loss_weights:
            raise ConfigError(
                "trunk='teacher' and critic_weight need a teacher, which is loaded where output_weight or "
                "feature_weight is not 0"
            )
        if self.teacher.has_own_latents:
            raise ConfigError(
                "a generator of few steps needs a teacher on the student's latents; leave 'latent' out of teacher.takes"
            )
        if config.critic_weight and config.teacher.rollout_steps > 1:
            raise ConfigError(
                f"teacher.rollout_steps={config.teacher.rollout_steps} asks the teacher where its flow ends, which is "
                "no score for the critic to be compared with; set it to 1, or critic_weight to 0"
            )

    def _check_heads(self) -> None:
        heads: DiscriminatorConfig = self.config.discriminator
        trunk = self.teacher.denoiser if self.config.trunk == "teacher" else self.denoiser
        shapes = tap_shapes(trunk, self.inputs.latent_shape(), heads.taps)
        widths = tuple(shapes[tap][-1] for tap in heads.taps)
        pooled = self.config.network.pooled_width or 0
        if widths != heads.channels or pooled != heads.pooled_width:
            raise ConfigError(
                f"the trunk's features {heads.taps} have widths {widths} and the pooled text has {pooled}; set "
                f"discriminator.channels={widths} and discriminator.pooled_width={pooled}"
            )

    # --- networks ---

    @property
    def _has_trunk(self) -> bool:
        return bool(self.config.adversarial_weight) and self.config.trunk == "student"

    def networks(self) -> dict[str, Network]:
        """As for the distillation, the discriminator, the critic, and the trunk unless that is the teacher."""
        config, student = self.config, self.denoiser.network
        return {
            **super().networks(),
            **({DISCRIMINATOR: self.discriminator} if config.adversarial_weight else {}),
            **({f"critic/{self.role}": student} if config.critic_weight else {}),
            **({f"trunk/{self.role}": student} if self._has_trunk else {}),
        }

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks as they are: `{role: parameters}`, those of the opponents too where they are given."""
        networks = super().weights(params, frozen)
        if DISCRIMINATOR in params:
            networks[DISCRIMINATOR] = params[DISCRIMINATOR]
        return {**networks, **prefixed("critic", params.get("critic", {}))}

    def init(self, key: jax.Array) -> TrainState:
        """As for the distillation, with the other players."""
        state = super().init(key)
        players = dict(state.players)
        if self.config.adversarial_weight:
            heads = init(self.discriminator, jax.random.fold_in(key, 100))
            players[DISCRIMINATOR] = new_player(heads, self.discriminator_optimizer, ema=False)
        if self.config.critic_weight:
            players["critic"] = self._new_critic(players["model"].params)
        return state.replace(players=players)

    def _new_critic(self, params: Tree) -> Player:
        """The critic begins as the generator."""
        copy = jax.tree.map(jnp.array, {self.role: params[self.role]})
        return new_player(copy, self.discriminator_optimizer, ema=False)

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """The generator from an earlier stage, and the critic, if there is one, as it; the heads begin anew."""
        started = super().warm_start(state, earlier)
        players = {**state.players, **started.players}
        if self.config.critic_weight:
            players["critic"] = self._new_critic(players["model"].params)
        return started.replace(players=players)

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """As for the distillation; and to train the trunk."""
        frozen = super().load_frozen(mesh, use)
        if not self._has_trunk or use == "generate":
            return frozen
        workdir = self.config.trunk_workdir or self.config.init_from
        if not workdir:
            raise ConfigError(
                "the discriminator has no trunk: set init_from, or trunk_workdir, to the run it comes from"
            )
        spec = {self.role: frozen_spec(self.denoiser.network)}
        rules = rules_of({self.role: self.denoiser.network}) if self.config.shard_student else ()
        return {**frozen, **prefixed("trunk", load_run(workdir, spec, mesh=mesh, rules=rules))}

    # --- training ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As for the distillation, at one of the few times; and the noise that the discriminator looks through."""
        drawn = super().draw(networks, batch, key, step)
        size, shape = drawn["x_0"].shape[:1], drawn["x_0"].shape
        keys = (jax.random.fold_in(key, i) for i in range(100, 106))
        which = jax.random.randint(next(keys), size, 0, len(self.levels.t))
        level = Level(*(jnp.asarray(value)[which] for value in self.levels))
        share = jax.nn.sigmoid(self.config.noise_mean + self.config.noise_std * jax.random.normal(next(keys), size))
        more = {"level": level, "s": level.t * share}
        for name in ("real_eps", "fake_eps"):
            more[name] = jax.random.normal(next(keys), shape)
        if self.config.critic_weight:
            more["critic_level"] = self.draw_level(next(keys), size, step)
            more["critic_eps"] = jax.random.normal(next(keys), shape)
        return {**drawn, **more}

    def features(self, networks: Tree, x_s: jax.Array, s: jax.Array, condition: TextContext, drawn: Tree) -> Tree:
        """What the trunk makes of noisy latents `[B, h, w, c]`: `{tap: [B, h, w, C]}`."""
        if self.config.trunk == "teacher":
            trunk, weights = self.teacher.denoiser, networks[f"teacher/{self.teacher.role}"]
            condition = self.teacher.condition(networks, drawn["teacher"], condition)
        else:
            trunk, weights = self.denoiser, networks[f"trunk/{self.role}"]
        weights, condition = jax.lax.stop_gradient((weights, condition))
        return trunk(weights, x_s, s, condition, taps=self.config.discriminator.taps)[1]

    def judge(self, networks: Tree, features: Tree, s: jax.Array, condition: TextContext) -> Tree:
        """Logits of every depth, `{tap: [B, h, w]}`."""
        time = time_features(s, self.config.discriminator.time_width)
        pooled = jax.lax.stop_gradient(condition.pooled)
        return apply(self.discriminator, networks[DISCRIMINATOR], features, time, pooled)

    def generated(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, TextContext]:
        """What the generator makes of the drawn examples, and what it was told. No gradient passes."""
        point, _ = self.predict(networks, drawn)
        return jax.lax.stop_gradient((x0_from_velocity(point.x_t, point.v, drawn["level"].t), point.condition))

    def discriminator_loss(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, Metrics]:
        """The hinge over all depths, and R1."""
        generated, condition = self.generated(networks, drawn)
        s = drawn["s"]
        real = self.features(networks, interpolate(drawn["x_0"], drawn["real_eps"], s), s, condition, drawn)
        fake = self.features(networks, interpolate(generated, drawn["fake_eps"], s), s, condition, drawn)
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

    def critic_loss(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, Metrics]:
        """Flow matching of what is generated, weighed in time as the student's is of the data."""
        generated, condition = self.generated(networks, drawn)
        level, eps = drawn["critic_level"], drawn["critic_eps"]
        v, _ = self.denoiser(networks[f"critic/{self.role}"], interpolate(generated, eps, level.t), level, condition)
        loss = jnp.mean(flow_matching_loss(v, velocity(generated, eps)) * self.time_weight(level))
        return loss, {"loss/critic": loss}

    def matching_loss(self, networks: Tree, drawn: Tree, x_0: jax.Array, condition: TextContext) -> jax.Array:
        """Distribution matching, `[B]`: the gradient by x0^ is the difference of the data ends that the critic and the
        teacher see from a noisy x0^, over the teacher's distance (Yin et al. 2024, "One-step Diffusion with
        Distribution Matching Distillation", equations 7 and 8)."""
        level = drawn["critic_level"]
        x_t = interpolate(x_0, drawn["critic_eps"], level.t)
        v_critic, _ = self.denoiser(networks[f"critic/{self.role}"], x_t, level, condition)
        v_teacher, _ = self.teacher.ask(networks, drawn["teacher"], x_t, level, condition)
        critic, teacher = (x0_from_velocity(x_t, v, level.t) for v in (v_critic, v_teacher))
        axes = tuple(range(1, x_0.ndim))
        scale = jnp.maximum(jnp.mean(jnp.abs(x_0 - teacher), axis=axes), 1e-3)
        towards = jax.lax.stop_gradient(x_0 - (critic - teacher) / expand_like(scale, x_0))
        return 0.5 * jnp.mean(jnp.square(x_0 - towards), axis=axes)

    def loss(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree]:
        """What the generator minimises."""
        losses, aux, point = self.examine(networks, drawn, extra)
        metrics = dict(aux.get("metrics", {}))
        x_0 = x0_from_velocity(point.x_t, point.v, drawn["level"].t)
        total = jnp.mean(losses)
        if self.config.adversarial_weight:
            s = drawn["s"]
            features = self.features(networks, interpolate(x_0, drawn["fake_eps"], s), s, point.condition, drawn)
            logits = self.judge(networks, features, s, point.condition)
            adversarial = jnp.mean(jnp.stack([hinge_generator_loss(x) for x in logits.values()]))
            metrics["loss/adversarial"] = adversarial
            total = total + self.config.adversarial_weight * adversarial
        if self.config.critic_weight:
            matching = jnp.mean(self.matching_loss(networks, drawn, x_0, point.condition))
            metrics["loss/matching"] = matching
            total = total + self.config.critic_weight * matching
        return total, {**aux, "metrics": metrics}

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """The discriminator steps, then the critic, then the generator against both as they now are."""
        drawn = self.draw(self.current(state, frozen), batch, key, state.step)
        metrics: Metrics = {}
        for name in (DISCRIMINATOR, "critic"):
            if name in state.players:
                player, found = self._step_opponent(name, state, frozen, drawn)
                metrics |= found
                state = state.replace(players={**state.players, name: player})
        new, more = self.learn(state, frozen, drawn)
        norm = more.pop("grad_norm")
        return new, {**metrics, **more, "grad_norm/model": norm}

    def _step_opponent(self, name: str, state: TrainState, frozen: Tree, drawn: Tree) -> tuple[Player, Metrics]:
        """The step of the player "discriminator" or "critic" beside the generator as it is."""
        config, player = self.config, state.players[name]
        objective = {DISCRIMINATOR: self.discriminator_loss, "critic": self.critic_loss}[name]
        others = {other: p.params for other, p in state.players.items()}

        def loss(params: Tree, drawn: Tree) -> tuple[jax.Array, Metrics]:
            return objective(self.weights({**others, name: params}, frozen), drawn)

        grads, _, metrics = accumulate_gradients(loss, player.params, drawn, config.microbatches)
        optimizer, clip_norm = self.discriminator_optimizer, config.discriminator_optimizer.clip_norm
        player, norm = step_player(player, grads, optimizer, state.step, clip_norm=clip_norm)
        return player, {**metrics, f"grad_norm/{name}": norm}

    def validation_error(
        self, networks: Tree, x_0: jax.Array, eps: jax.Array, level: Level, condition: Any
    ) -> jax.Array:
        """`[B]`: the squared error of the jump to the data, `|| x0^ - x_0 ||^2 = t^2 || v - (eps - x_0) ||^2`."""
        return jnp.square(level.t) * super().validation_error(networks, x_0, eps, level, condition)

    def parts(self) -> Mapping[str, Part]:
        """Also "discriminator" and "generator", the steps of these players, each without the other's."""

        def drawn(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            return self.draw(self.current(state, frozen), batch, key, state.step)

        def discriminator(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            return self._step_opponent(DISCRIMINATOR, state, frozen, drawn(state, frozen, batch, key))

        def generator(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            new, metrics = self.learn(state, frozen, drawn(state, frozen, batch, key))
            return new.players["model"], metrics

        playing = {DISCRIMINATOR: discriminator} if self.config.adversarial_weight else {}
        return {**super().parts(), **playing, "generator": generator}


RECIPE = Adversarial
