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

from snapgen_jax.diffusion.path import expand_like, interpolate, velocity, x0_from_velocity
from snapgen_jax.diffusion.timesteps import time_grid
from snapgen_jax.losses.adversarial import gradient_penalty, hinge_discriminator_loss, hinge_generator_loss
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.networks.module import Platform, apply, build, for_platform, init
from snapgen_jax.networks.module import frozen_spec as spec_of
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.recipes.distillation import DistillationConfig, Distilled, tap_shapes
from snapgen_jax.recipes.flow_matching import SamplingConfig, predict
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    clip_by_joint_norm,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import Metrics, Part
from snapgen_jax.training.state import Player, TrainState
from snapgen_jax.weights.frozen import load_run

Tree = Any


@dataclasses.dataclass(frozen=True)
class FewStepConfig:
    """How a generator of few steps is trained.

    Attributes:
        trunk: what the discriminator looks through: a frozen copy of the student, or the teacher. It reads the text as
            the generator does: a text encoder that is trained beside the generator (`text_workdir=""`) changes what the
            trunk says, unless the trunk is a teacher with a text encoder of his own.
        trunk_workdir: the run of that copy; as a rule `init_from`. Its network has the student's architecture.
        discriminator: its heads; `taps` are features of the trunk.
        discriminator_optimizer: of the heads, and of the critic.
        adversarial_weight: of the generator's adversarial loss; 0 leaves it and the discriminator out.
        penalty_weight: of R1 on the features of the data, which counts every cell; that of "Adversarial Diffusion
            Distillation", section 4.
        noise_mean, noise_std: of logit(s / t), where s < t is the noise that the discriminator looks through.
        critic_weight: of the distribution matching loss; 0 leaves it and the critic out. Needs a teacher who is asked
            for his velocity, not for where his flow ends (`teacher.rollout_steps`).
    """

    trunk: Literal["student", "teacher"] = "student"
    trunk_workdir: str = ""
    discriminator: DiscriminatorConfig = DiscriminatorConfig.preset("shapes")
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, b1=0.0, b2=0.99, warmup_steps=0)
    adversarial_weight: float = 0.1
    penalty_weight: float = 1e-5
    noise_mean: float = 0.0
    noise_std: float = 1.0
    critic_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class AdversarialConfig(FewStepConfig, DistillationConfig):
    """Step distillation on pixels and captions: the fields of `distillation` and of `FewStepConfig`.

    `sampling.steps` and `sampling.shift` are the times at which the generator is trained; its method is "renoise" and
    its guidance 1.
    """

    feature_weight: float = 0.0
    sampling: SamplingConfig = SamplingConfig(steps=4, guidance=1.0, method="renoise", shift=3.0)


class FewStep(Distilled):
    """What makes a distilled recipe one of few steps, on pixels or on stored latents. Mixed in before that recipe."""

    def __init__(self, config: Any, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the heads do not fit the trunk, sampling is not the generator's, or the teacher is not who is
                needed.
        """
        super().__init__(config, platform)
        asked: FewStepConfig = config
        self.times = time_grid(config.sampling.steps, config.sampling.shift)[:-1]
        self.validation_times = tuple(self.times.tolist())  # at others the generator is never asked
        self.discriminator, _ = build(for_platform(asked.discriminator, platform))
        self.discriminator_optimizer = make_optimizer(asked.discriminator_optimizer, config.train_steps)
        if config.sampling.method != "renoise":
            raise ValueError(
                f"sampling.method={config.sampling.method!r} does not jump to the data, as this generator learns to; "
                "set it to 'renoise'"
            )
        if config.sampling.guidance != 1:
            raise ConfigError(
                f"sampling.guidance={config.sampling.guidance} asks the generator twice at each time, where it learns "
                "to be asked once; set it to 1, and teacher.guidance to what it is to learn"
            )
        if (asked.critic_weight or (asked.adversarial_weight and asked.trunk == "teacher")) and not self.weights:
            raise ValueError(
                "trunk='teacher' and critic_weight need a teacher, who is loaded where output_weight or feature_weight "
                "is not 0"
            )
        if self.has_own_latents:
            raise ValueError(
                "a generator of few steps needs a teacher on the student's latents; leave teacher.codec out"
            )
        if asked.critic_weight and config.teacher.rollout_steps > 1:
            raise ConfigError(
                f"teacher.rollout_steps={config.teacher.rollout_steps} asks the teacher where his flow ends, which is "
                "no score for the critic to be compared with; set it to 1, or critic_weight to 0"
            )
        self._check_heads()

    def _check_heads(self) -> None:
        heads: DiscriminatorConfig = self.config.discriminator
        network, spec = (
            (self.teacher, self.teacher_spec) if self.config.trunk == "teacher" else (self.network, self.network_spec)
        )
        shapes = tap_shapes(network, spec, self.latent_shape(self.config.image_sizes[0]), heads.taps)
        widths = tuple(shapes[tap][-1] for tap in heads.taps)
        pooled = self.network_config.pooled_width or 0
        if widths != heads.channels or pooled != heads.pooled_width:
            raise ValueError(
                f"the trunk's features {heads.taps} have widths {widths} and the pooled text has {pooled}; set "
                f"discriminator.channels={widths} and discriminator.pooled_width={pooled}"
            )

    # --- the state, and what is not in it ---

    def init(self, key: jax.Array) -> TrainState:
        """As for the distillation, with the other players."""
        state = super().init(key)
        players = dict(state.players)
        if self.config.adversarial_weight:
            heads = init(self.discriminator, jax.random.fold_in(key, 100))
            players["discriminator"] = new_player(heads, self.discriminator_optimizer, ema=False)
        if self.config.critic_weight:
            players["critic"] = self._new_critic(players["model"].params)
        return state.replace(players=players)

    def _new_critic(self, params: Tree) -> Any:
        """The critic begins as the generator."""
        copy = jax.tree.map(jnp.array, {self.network_name: params[self.network_name]})
        return new_player(copy, self.discriminator_optimizer, ema=False)

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """The generator from an earlier stage, and the critic, if there is one, as it; the heads begin anew."""
        started = super().warm_start(state, earlier)
        players = {**state.players, **started.players}
        if self.config.critic_weight:
            players["critic"] = self._new_critic(players["model"].params)
        return started.replace(players=players)

    def frozen_spec(self) -> Tree:
        """As for the distillation, and `{"trunk"}`, unless that is the teacher."""
        spec = super().frozen_spec()
        if self.config.adversarial_weight and self.config.trunk == "student":
            spec = {**spec, "trunk": {self.network_name: spec_of(self.network)}}
        return spec

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Reads the trunk too."""
        frozen, spec = super().load_frozen(mesh), self.frozen_spec()
        if "trunk" not in spec:
            return frozen
        if not self.config.trunk_workdir:
            raise ConfigError("the discriminator has no trunk: set trunk_workdir to the run that init_from names")
        return {**frozen, "trunk": load_run(self.config.trunk_workdir, spec["trunk"], mesh=mesh, rules=self.rules())}

    # --- training ---

    def draw(self, frozen: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As for the distillation, at one of the few times; and the noise that the discriminator looks through."""
        drawn = super().draw(frozen, batch, key, step)
        size, shape = drawn["t"].shape, drawn["x_0"].shape
        keys = (jax.random.fold_in(key, i) for i in range(100, 106))
        t = jnp.asarray(self.times)[jax.random.randint(next(keys), size, 0, len(self.times))]
        share = jax.nn.sigmoid(self.config.noise_mean + self.config.noise_std * jax.random.normal(next(keys), size))
        more = {"t": t, "s": t * share}
        for name in ("real_eps", "fake_eps"):
            more[name] = jax.random.normal(next(keys), shape)
        if self.config.critic_weight:
            more["critic_t"] = self.draw_times(next(keys), size, step)
            more["critic_eps"] = jax.random.normal(next(keys), shape)
        return {**drawn, **more}

    def features(self, params: Tree, x_s: jax.Array, s: jax.Array, context: TextContext, drawn: Tree) -> Tree:
        """What the trunk makes of noisy latents `[B, h, w, c]`: `{tap: [B, h, w, C]}`."""
        if self.config.trunk == "teacher":
            network, weights = self.teacher, params["teacher"][self.config.teacher.network]
            context = self.teacher_context(params, drawn, context)
        else:
            network, weights = self.network, params["trunk"][self.network_name]
        weights, context = jax.lax.stop_gradient((weights, context))
        return predict(network, weights, x_s, s, context, taps=self.config.discriminator.taps)[1]

    def judge(self, heads: Tree, features: Tree, s: jax.Array, context: TextContext) -> Tree:
        """Logits of every depth, `{tap: [B, h, w]}`."""
        time = time_features(s, self.config.discriminator.time_width)
        return apply(self.discriminator, heads, features, time, jax.lax.stop_gradient(context.pooled))

    def generated(self, params: Tree, drawn: Tree) -> tuple[jax.Array, TextContext]:
        """What the generator makes of the drawn examples, and what it was told. No gradient passes."""
        context = self.condition(params, drawn)
        x_t = interpolate(drawn["x_0"], drawn["eps"], drawn["t"])
        x_0 = x0_from_velocity(x_t, self.predict(params, x_t, drawn["t"], context), drawn["t"])
        return jax.lax.stop_gradient((x_0, context))

    def discriminator_loss(self, heads: Tree, params: Tree, drawn: Tree) -> tuple[jax.Array, Metrics]:
        """The hinge over all depths, and R1."""
        made, context = self.generated(params, drawn)
        s = drawn["s"]
        real = self.features(params, interpolate(drawn["x_0"], drawn["real_eps"], s), s, context, drawn)
        fake = self.features(params, interpolate(made, drawn["fake_eps"], s), s, context, drawn)
        real_logits, fake_logits = (self.judge(heads, found, s, context) for found in (real, fake))
        hinge = jnp.mean(
            jnp.stack([hinge_discriminator_loss(real_logits[tap], fake_logits[tap]) for tap in real_logits])
        )
        penalty = jnp.float32(0)
        if self.config.penalty_weight:
            penalty = jnp.mean(gradient_penalty(lambda features: self.judge(heads, features, s, context), real))
        metrics = {"loss/discriminator": hinge, "penalty": penalty}
        for name, logits in (("real", real_logits), ("fake", fake_logits)):
            metrics[f"logits/{name}"] = jnp.mean(jnp.stack([x.mean() for x in logits.values()]))
        return hinge + self.config.penalty_weight * penalty, metrics

    def critic_loss(self, critic: Tree, params: Tree, drawn: Tree) -> tuple[jax.Array, Metrics]:
        """Flow matching of what is generated, weighed in time as the student's is of the data."""
        made, context = self.generated(params, drawn)
        x, t = interpolate(made, drawn["critic_eps"], drawn["critic_t"]), drawn["critic_t"]
        v = self.predict({**params, **critic}, x, t, context)
        losses = flow_matching_loss(v, velocity(made, drawn["critic_eps"]))
        loss = jnp.mean(losses * self.time_weight(t))
        return loss, {"loss/critic": loss}

    def matching_loss(self, params: Tree, drawn: Tree, x_0: jax.Array, context: TextContext) -> jax.Array:
        """Distribution matching, `[B]`: the gradient by x0^ is the difference of the data ends that the critic and the
        teacher see from a noisy x0^, over the teacher's distance (Yin et al. 2024, "One-step Diffusion with
        Distribution Matching Distillation", equations 7 and 8)."""
        t = drawn["critic_t"]
        x_t = interpolate(x_0, drawn["critic_eps"], t)
        v_critic = self.predict({**params, **params["critic"]}, x_t, t, context)
        v_teacher, _ = self.ask_teacher(params, {**drawn, "t": t}, x_t, context, ())
        critic, teacher = (x0_from_velocity(x_t, v, t) for v in (v_critic, v_teacher))
        axes = tuple(range(1, x_0.ndim))
        scale = jnp.maximum(jnp.mean(jnp.abs(x_0 - teacher), axis=axes), 1e-3)
        towards = jax.lax.stop_gradient(x_0 - (critic - teacher) / expand_like(scale, x_0))
        return 0.5 * jnp.mean(jnp.square(x_0 - towards), axis=axes)

    def loss(self, params: Tree, drawn: Tree) -> tuple[jax.Array, Tree]:
        """What the generator minimises."""
        losses, found, seen = self.examine(params, drawn)
        metrics = dict(found.get("metrics", {}))
        x_0 = x0_from_velocity(seen.x_t, seen.v, drawn["t"])
        total = jnp.mean(losses)
        if self.config.adversarial_weight:
            x_s = interpolate(x_0, drawn["fake_eps"], drawn["s"])
            features = self.features(params, x_s, drawn["s"], seen.context, drawn)
            logits = self.judge(params["discriminator"], features, drawn["s"], seen.context)
            adversarial = jnp.mean(jnp.stack([hinge_generator_loss(x) for x in logits.values()]))
            metrics["loss/adversarial"] = adversarial
            total = total + self.config.adversarial_weight * adversarial
        if self.config.critic_weight:
            matching = jnp.mean(self.matching_loss(params, drawn, x_0, seen.context))
            metrics["loss/matching"] = matching
            total = total + self.config.critic_weight * matching
        return total, {**found, "metrics": metrics}

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """The discriminator steps, then the critic, then the generator against both as they now are."""
        players, drawn = dict(state.players), self.draw(frozen, batch, key, state.step)
        given = {**frozen, **state.extra}
        metrics: Metrics = {}
        for name in ("discriminator", "critic"):
            if name in players:
                players[name], found = self._step_opponent(name, state, given, drawn)
                metrics |= found
                given[name] = players[name].params
        new, further = self.learn(state.replace(players=players), given, drawn)
        norm = further.pop("grad_norm")
        return new, {**metrics, **further, "grad_norm/model": norm}

    def _step_opponent(self, name: str, state: TrainState, given: Tree, drawn: Tree) -> tuple[Player, Metrics]:
        """The step of the player "discriminator" or "critic" beside the generator as it is."""
        config, player = self.config, state.players[name]
        loss = {"discriminator": self.discriminator_loss, "critic": self.critic_loss}[name]
        networks = {**given, **state.players["model"].params}
        grads, _, found = accumulate_gradients(
            lambda params, drawn: loss(params, networks, drawn), player.params, drawn, config.microbatches
        )
        grads, norm = clip_by_joint_norm(grads, config.discriminator_optimizer.clip_norm)
        player = step_player(player, grads, self.discriminator_optimizer, state.step, 0.0)
        return player, {**found, f"grad_norm/{name}": norm}

    def validation_error(
        self, params: Tree, x_0: jax.Array, eps: jax.Array, t: jax.Array, context: TextContext
    ) -> jax.Array:
        """`[B]`: the squared error of the jump to the data, `|| x0^ - x_0 ||^2 = t^2 || v - (eps - x_0) ||^2`."""
        return jnp.square(t) * super().validation_error(params, x_0, eps, t, context)

    def parts(self) -> Mapping[str, Part]:
        """Also "discriminator" and "generator", the steps of these players, each without the other's."""

        def discriminator(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            drawn = self.draw(frozen, batch, key, state.step)
            return self._step_opponent("discriminator", state, {**frozen, **state.extra}, drawn)

        def generator(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            others = {name: player.params for name, player in state.players.items() if name != "model"}
            drawn = self.draw(frozen, batch, key, state.step)
            new, metrics = self.learn(state, {**frozen, **state.extra, **others}, drawn)
            return new.players["model"], metrics

        playing = {"discriminator": discriminator} if self.config.adversarial_weight else {}
        return {**super().parts(), **playing, "generator": generator}


class Adversarial(FewStep):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = AdversarialConfig


RECIPE = Adversarial
