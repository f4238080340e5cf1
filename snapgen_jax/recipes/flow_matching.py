"""Flow matching: a network learns the velocity of the straight path from noise to data.

    x_t = (1 - t) x_0 + t eps,   v = eps - x_0,   L = || v_theta(x_t, t, c) - v ||^2        (Liu et al. 2022, eq. 1)

t is drawn from a logit-normal density (Esser et al. 2024), and the condition is dropped now and then for
classifier-free guidance (Ho and Salimans 2022). The inputs say what x_0 and c are. One player, "model", holds the
network, and those networks of the inputs that have no origin, such as a text encoder that is trained beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.bounds import SHARE, at_least, check, check_texts
from snapgen_jax.diffusion.path import interpolate, velocity
from snapgen_jax.diffusion.schedules import FlowSchedule, Level, Schedule
from snapgen_jax.diffusion.stages import Stages, run_stages
from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.inputs.registry import InputsConfig
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.module import Network, Platform, build, for_platform
from snapgen_jax.networks.registry import DenoiserConfig
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes._assembly import (
    Specs,
    check_context,
    frozen_roles,
    init_roles,
    specs_of,
    taken_from,
    trained_roles,
    warn_of_unused_dropout,
)
from snapgen_jax.recipes._flow_export import Time, flow_plan
from snapgen_jax.recipes._sampling import SamplingConfig, check_sampling, initial_noise, noise_shape, sample_flow
from snapgen_jax.systems.denoiser import Denoiser, Prediction
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.exports import ExportPlan, GoldenInputs
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import Metrics, Part, Use
from snapgen_jax.training.state import Player, TrainState

Tree = Any
VALIDATION_TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig:
    """Flow matching of a conditional network.

    Attributes:
        batch_size: examples in a global batch.
        microbatches: the global batch is computed in this many parts.
        train_steps: updates in the run; where a decaying learning rate ends.
        network: which network learns, told apart by `kind`: the SnapGen "unet", or the "mmdit" of Stable Diffusion 3.
        inputs: what it is fed, told apart by `kind`: "captions", "clip_captions", "encoders",
            "stored", "stored_clip_captions", "stored_encodings" or "class_labels".
        prediction: what the network's output stands for: the velocity, or the image ("x_0"), from which the velocity
            follows as `(x_t - x_0) / t`; "eps", "v" or "F" under another schedule. Where a latent has more channels
            than the image has degrees of freedom, as with large patches of pixels, the image is the easier target: the
            network need not carry the noise through.
        schedule: the density of training times, and the noise schedule that the network knows; "flow" as a rule.
        loss_full_from: time s from which the velocity's error counts in full; below it the weight is (t / s)^2. The
            velocity's error is the image's divided by t^2, so that with a predicted image it is the image's error that
            counts evenly below s, and examples with little noise do not drown the others. 0 weighs all times alike.
        ema_decay: of the averaged weights; 0 keeps no average.
        sample_prompts: prompts of the sample grid.
    """

    batch_size: int = 32
    microbatches: int = 1
    train_steps: int = 1000
    network: DenoiserConfig = UNetConfig.preset("shapes")
    inputs: InputsConfig = CaptionsConfig()
    prediction: Prediction = "velocity"
    schedule: Schedule = FlowSchedule()
    loss_full_from: float = 0.0
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.999
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sample_prompts: tuple[str, ...] = ("a red circle", "a blue square", "two green stars", "a ring above a cross")

    def __post_init__(self) -> None:
        check(self, batch_size=at_least(1), microbatches=at_least(1), train_steps=at_least(1))
        check(self, loss_full_from=SHARE, ema_decay=SHARE)
        check_texts(self, "sample_prompts")


class Point(NamedTuple):
    """A point of the path and what the network makes of it: `v` `[B, ...]` at `x_t` `[B, ...]`, given `condition`."""

    x_t: jax.Array
    v: jax.Array
    condition: Any


class FlowMatching:
    """See the top of this file. Implements `training.recipe.Recipe`.

    Attributes:
        exported_time: what its exported network is told of the time, see `flow_plan`.
    """

    Config = FlowMatchingConfig
    exported_time: Time = "features"

    def __init__(self, config: FlowMatchingConfig, platform: Platform):
        """`platform` is the one compiled for; it fixes compute dtype and form of the depthwise convolution.

        Raises:
            ValueError: the network does not fit what it is fed, or the sampling not its schedule.
        """
        self.config: Any = config
        self.platform: Platform = platform
        self.inputs = config.inputs.build(config.batch_size, platform)
        network, _ = build(for_platform(config.network, platform))
        self.denoiser = Denoiser(network, config.prediction, config.schedule)
        self.role = config.network.kind
        self.options = config.sampling
        self.validation_levels: Level = config.schedule.level(np.asarray(VALIDATION_TIMES, np.float32))
        self.trains: Mapping[str, tuple[str, ...]] = {"model": (self.role, *trained_roles(self.inputs))}
        self.optimizer: optax.GradientTransformation = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)
        channels = self.inputs.latent_shape()[-1]
        if channels != config.network.latent_channels:
            raise ValueError(
                f"the inputs give {channels} latent channels and network.latent_channels is "
                f"{config.network.latent_channels}; make them equal"
            )
        check_context(config.network, self.inputs)
        check_sampling(config.schedule, config.sampling)
        warn_of_unused_dropout(self.inputs, config.sampling)

    # --- networks ---

    def networks(self) -> dict[str, Network]:
        """`{role: network}` of all that the step uses."""
        return {self.role: self.denoiser.network, **self.inputs.networks()}

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks as they are: `{role: parameters}`."""
        return {**frozen, **params["model"]}

    def init(self, key: jax.Array) -> TrainState:
        """Draws what "model" holds."""
        player = self.new_player(self.first_params(key))
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})

    def first_params(self, key: jax.Array) -> dict[str, Tree]:
        """`{role: parameters}` that "model" holds before its first update."""
        return init_roles(self.networks(), (self.role, *trained_roles(self.inputs)), key)

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from `{player: weights}` of an earlier stage; optimizer, average and schedule begin anew. What the
        earlier stage trained beside these networks is left behind, and a warning names it."""
        params = taken_from(state.players["model"].params, earlier.get("model", {}))
        return state.replace(players={"model": self.new_player(params)})

    def new_player(self, params: Tree) -> Player:
        """The player "model" before its first update."""
        return new_player(params, self.optimizer, ema=self.config.ema_decay > 0)

    def frozen_spec(self) -> Tree:
        """`{role: shapes}` of the networks that no player trains."""
        networks = self.networks()
        return specs_of(networks, frozen_roles(networks, self.trains))

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Reads the inputs' frozen networks: a text encoder of an earlier run, a codec, where there are such."""
        del use
        frozen = frozen_roles(self.networks(), self.trains)
        return self.inputs.load(tuple(role for role in self.inputs.networks() if role in frozen), mesh)

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the networks."""
        return rules_of(self.networks())

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """Those of the inputs."""
        return self.inputs.batch_specs()

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the inputs."""
        return self.inputs.tokenizers()

    def conditions(self) -> tuple[str, ...]:
        """Those of the inputs."""
        return self.inputs.conditions()

    # --- training ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """Everything random about one global batch: noise, times, and what is left of the condition.

        Returns:
            `x_0` and `eps` `[B, ...]`, `level` (`Level` of `[B]`), and `kept` and `condition`, as from the inputs.
        """
        eps_key, time_key, condition_key = jax.random.split(key, 3)
        x_0 = self.inputs.clean(networks, batch)
        kept = self.inputs.draw_kept(condition_key, x_0.shape[0])
        return {
            "x_0": x_0,
            "eps": jax.random.normal(eps_key, x_0.shape),
            "level": self.draw_level(time_key, x_0.shape[:1], step),
            "kept": kept,
            "condition": self.inputs.draw_condition(networks, batch, jax.random.fold_in(condition_key, 1), kept),
        }

    def draw_level(self, key: jax.Array, shape: tuple[int, ...], step: int | jax.Array) -> Level:
        """Times of training at an update."""
        return self.config.schedule.draw(key, shape, step / self.config.train_steps)

    def loss(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree]:
        """Mean loss of examples whose noise, times and conditions are drawn.

        Args:
            networks: `{role: parameters}`, as from `weights`.
            drawn: as from `draw`.
            extra: the recipe's own arrays.

        Returns:
            The loss, and what `report` makes of it.
        """
        losses, aux, _ = self.examine(networks, drawn, extra)
        return jnp.mean(losses), aux

    def examine(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree, Point]:
        """The loss of each example `[B]`, what `report` makes of it, and what the network predicted."""
        del extra
        point = self.predict(networks, drawn)[0]
        return self.task_loss(drawn, point) * self.time_weight(drawn["level"]), {}, point

    def task_loss(self, drawn: Tree, point: Point) -> jax.Array:
        """`[B]`: the squared error of the velocity, by the data that were drawn."""
        return flow_matching_loss(point.v, velocity(drawn["x_0"], drawn["eps"]))

    def predict(self, networks: Tree, drawn: Tree, taps: Sequence[str] = ()) -> tuple[Point, dict[str, jax.Array]]:
        """What the network makes of drawn examples, and its named intermediates."""
        condition = self.inputs.condition(networks, drawn["condition"])
        x_t = self.start(networks, drawn, condition)
        v, features = self.denoiser(networks[self.role], x_t, drawn["level"], condition, taps=taps)
        return Point(x_t, v, condition), features

    def start(self, networks: Tree, drawn: Tree, condition: Any) -> jax.Array:
        """The point `x_t` `[B, ...]` at which the network is asked about each drawn example: on the path."""
        del networks, condition
        return interpolate(drawn["x_0"], drawn["eps"], drawn["level"].t)

    def time_weight(self, level: Level) -> jax.Array | float:
        """Of the velocity's squared error: see `loss_full_from`; under another schedule than a flow's, what makes it
        the error of the network's own output."""
        config = self.config
        if config.schedule.kind != "flow":
            return config.schedule.loss_weight(level, config.prediction)
        return jnp.square(jnp.minimum(1.0, level.t / config.loss_full_from)) if config.loss_full_from else 1.0

    def report(self, extra: Tree, aux: Tree) -> tuple[Tree, Metrics]:
        """The next `extra`, and further metrics, from what the loss found beside its value."""
        del aux
        return extra, {}

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One optimizer step on the loss."""
        return self.learn(state, frozen, self.draw(self.current(state, frozen), batch, key, state.step))

    def current(self, state: TrainState, frozen: Tree) -> dict[str, Tree]:
        """The networks `{role: parameters}` of a state."""
        return self.weights({name: player.params for name, player in state.players.items()}, frozen)

    def learn(self, state: TrainState, frozen: Tree, drawn: Tree) -> tuple[TrainState, Metrics]:
        """The step of the player "model" beside all others as they are."""
        player, others = state.players["model"], {name: p.params for name, p in state.players.items()}

        def loss(params: Tree, drawn: Tree) -> tuple[jax.Array, Tree]:
            return self.loss(self.weights({**others, "model": params}, frozen), drawn, state.extra)

        grads, value, aux = accumulate_gradients(loss, player.params, drawn, self.config.microbatches)
        config = self.config
        player, norm = step_player(
            player,
            grads,
            self.optimizer,
            state.step,
            clip_norm=config.optimizer.clip_norm,
            ema_decay=config.ema_decay,
        )
        extra, more = self.report(state.extra, aux)
        rate = jnp.asarray(self.learning_rate(state.step))
        metrics = {"loss": value, **more, "grad_norm": norm, "learning_rate": rate}
        return state.replace(players={**state.players, "model": player}, extra=extra), metrics

    def parts(self) -> Mapping[str, Part]:
        """ "draw", all that comes before the loss: where there are frozen encoders, mainly what they do."""

        def draw(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            return self.draw(self.current(state, frozen), batch, key, state.step)

        return {"draw": draw}

    # --- use ---

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: SamplingConfig
    ) -> dict[str, jax.Array]:
        """Examples from noise.

        Args:
            params: `{"model": ...}`.
            frozen: as from `load_frozen`.
            conditions: arrays of `conditions()` `[B, ...]`; optionally `noise` instead of noise from the keys,
                `[B, *noise_shape]`.
            keys: `[B]` keys.
            options: see `SamplingConfig`.

        Returns:
            what the inputs decode (`image` uint8 `[B, H, W, 3]`), `latent` float32 `[B, ...]`, and the `noise` it
            began with.

        Raises:
            ValueError: the given noise has another shape.
        """
        begin = {"conditions": conditions, "keys": keys}
        return run_stages(self.stages(options), self.weights(params, frozen), begin)

    def stages(self, options: SamplingConfig) -> Stages:
        """Those of `generate`, from `{"conditions", "keys"}`."""
        shape = noise_shape(self.inputs.latent_shape(options.image_size), options)

        def encoders(networks: Tree, given: Tree) -> Tree:
            conditions, keys = given["conditions"], given["keys"]
            noise = conditions["noise"] if "noise" in conditions else initial_noise(keys, shape)
            expected = (*keys.shape, *shape)
            if noise.shape != expected:
                raise ValueError(
                    f"the noise is {noise.shape}; this method, number of steps and image size take {expected}"
                )
            told = self.inputs.draw_condition(networks, conditions, keys[0], {})  # drops nothing, so it draws nothing
            condition, null = self.inputs.condition(networks, told), self.inputs.null_condition(networks)
            return {"noise": noise, "condition": condition, "null": null}

        def steps(networks: Tree, given: Tree) -> Tree:
            latent, carry = self.sample(networks, given["noise"], given["condition"], given["null"], options)
            return {"latent": latent, "noise": given["noise"], **self.recorded(carry)}

        def decoder(networks: Tree, given: Tree) -> Tree:
            return {**self.inputs.decode(networks, given["latent"]), **given}

        return {"encoders": encoders, "steps": steps, "decoder": decoder}

    def sample(
        self, networks: Tree, noise: jax.Array, condition: Any, null: Any, options: SamplingConfig
    ) -> tuple[jax.Array, Any]:
        """The `x_0` `[B, ...]` that noise `[B, *noise_shape]` leads to under guidance, and the last carry; `null` is
        `[1, ...]`."""

        def denoise(x_t: jax.Array, level: Level, i: jax.Array, carry: Any, c: Any) -> tuple[jax.Array, Any]:
            return self.denoise(networks, x_t, level, i, carry, c, options)

        carry = self.first_carry(networks, noise, condition, options)
        return sample_flow(denoise, self.config.schedule, noise, condition, null, options, carry)

    def denoise(
        self, networks: Tree, x_t: jax.Array, level: Level, i: jax.Array, carry: Any, condition: Any, options: Any
    ) -> tuple[jax.Array, Any]:
        """One call while sampling: the velocity, and the next carry. A method that caches gives another."""
        del i, options
        return self.denoiser(networks[self.role], x_t, level, condition)[0], carry

    def first_carry(self, networks: Tree, noise: jax.Array, condition: Any, options: Any) -> Any:
        """What `denoise` carries into its first call."""
        del networks, noise, condition, options
        return None

    def recorded(self, carry: Any) -> dict[str, jax.Array]:
        """What `generate` returns of the last carry, `{name: [B, ...]}`."""
        del carry
        return {}

    def codec(self, params: Tree, frozen: Tree) -> Any:
        """That of the inputs."""
        return self.inputs.codec(self.weights(params, frozen))

    # --- measuring and leaving ---

    def validation_loss(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """Per-example error `[B]` at each of `validation_levels`, with the same noise at each; and their mean."""
        networks, levels = self.weights(params, frozen), self.validation_levels
        x_0 = self.inputs.clean(networks, batch)
        told = self.inputs.draw_condition(networks, batch, jax.random.fold_in(key, 1), {})
        eps, condition = jax.random.normal(key, x_0.shape), self.inputs.condition(networks, told)

        def at(level: Level) -> jax.Array:
            level = Level(*(jnp.full(x_0.shape[:1], value) for value in level))
            return self.validation_error(networks, x_0, eps, level, condition)

        losses = jax.lax.map(at, jax.tree.map(jnp.asarray, levels))  # [T, B]
        by_time = {f"t={t:.2f}": losses[i] for i, t in enumerate(levels.t.tolist())}
        return {"mean": losses.mean(axis=0), **by_time}

    def validation_error(
        self, networks: Tree, x_0: jax.Array, eps: jax.Array, level: Level, condition: Any
    ) -> jax.Array:
        """`[B]`: the squared error of the velocity."""
        v, _ = self.denoiser(networks[self.role], interpolate(x_0, eps, level.t), level, condition)
        return flow_matching_loss(v, velocity(x_0, eps))

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Those that `config.evaluation` names."""
        when = self.config.evaluation
        parts = {
            "validation_loss": {"function": self.validation_loss},
            "sample_grid": {"options": {"prompts": self.config.sample_prompts if self.tokenizers() else ()}},
        }
        return [when.spec(name, **parts.get(name, {})) for name in when.names]

    def exports(self) -> ExportPlan:
        """The network and the inputs' own units (text encoders, decoder), at the first image size."""
        brought = self.inputs.exports()
        told = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in brought.null.items()}
        networks = {role: build(network.config)[1] for role, network in self.networks().items()}
        decoded = jax.eval_shape(
            self.inputs.decode, networks, jax.ShapeDtypeStruct((1, *self.inputs.latent_shape()), jnp.float32)
        )
        return flow_plan(
            denoiser_role=self.role,
            denoiser=self.denoiser,
            sampling=self.options,
            latent_shape=self.inputs.latent_shape(),
            image_shape=decoded["image"].shape[1:] if decoded else (),
            context=brought.context or jax.eval_shape(self.inputs.condition, networks, told),
            inputs=brought,
            golden=GoldenInputs(
                prompts=(self.config.sample_prompts[:2] or ("",)) if brought.tokenizers else (), arrays=brought.golden
            ),
            time=self.exported_time,
        )


RECIPE = FlowMatching
