"""Flow matching: a network learns the velocity of the straight path from noise to images, with its text encoder.

    x_t = (1 - t) x_0 + t eps,   v = eps - x_0,   L = || v_theta(x_t, t, c) - v ||^2        (Liu et al. 2022, eq. 1)

t is drawn from a logit-normal density (Esser et al. 2024), captions are dropped now and then for classifier-free
guidance (Ho and Salimans 2022). One player, "model", holds both networks: `unet` or `mmdit`, and `text`, unless the
text encoder is that of an earlier run, which stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.diffusion.guidance import drop_condition, with_guidance
from snapgen_jax.diffusion.path import interpolate, velocity, velocity_from_x0
from snapgen_jax.diffusion.samplers import Method, sample
from snapgen_jax.diffusion.timesteps import TimestepConfig, sample_times, time_grid
from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.clip import ClipTextConfig, null_tokens
from snapgen_jax.networks.codec import Codec, CodecConfig, build_codec, from_uint8, to_uint8
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, init
from snapgen_jax.networks.module import frozen_spec as spec_of
from snapgen_jax.networks.rules import within
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes._flow_export import export_plan
from snapgen_jax.training.accumulate import accumulate_gradients
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    clip_by_joint_norm,
    learning_rate_schedule,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import ExportPlan, Metrics, Part
from snapgen_jax.training.state import Player, TrainState
from snapgen_jax.weights.frozen import load_codec, load_run

Tree = Any
Prediction = Literal["velocity", "x_0"]
VALIDATION_TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are made unless a call says otherwise.

    Attributes:
        steps: network evaluations, or half of them (Heun).
        guidance: scale w of classifier-free guidance; 1 is none.
        method: "euler" or "heun", or "renoise" for a network that jumps to the data; see `diffusion.samplers.sample`.
        shift: of the grid of times; see `shift_time`.
    """

    steps: int = 28
    guidance: float = 3.0
    method: Method = "euler"
    shift: float = 1.0


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig:
    """Flow matching of a text-conditional network.

    Attributes:
        batch_size: images in a global batch.
        microbatches: the global batch is computed in this many parts.
        train_steps: updates in the run; where a decaying learning rate ends.
        image_sizes: (height, width) of each aspect bucket, in pixels.
        network: which network learns: the SnapGen UNet, or the MMDiT of Stable Diffusion 3, a teacher.
        unet, mmdit: its architecture; that of the other is passed over.
        text: architecture of the text encoder.
        text_workdir: a run of the recipe `contrastive` whose text encoder, frozen, and tokenizer are used; "" trains
            both beside the network.
        prediction: what the network's output stands for: the velocity, or the image, from which the velocity follows as
            `(x_t - x_0) / t`. Where a latent has more channels than the image has degrees of freedom, as with large
            patches of pixels, the image is the easier target: the network need not carry the noise through.
        loss_full_from: time s from which the velocity's error counts in full; below it the weight is (t / s)^2. The
            velocity's error is the image's divided by t^2, so that with a predicted image it is the image's error that
            counts evenly below s, and examples with little noise do not drown the others. 0 weighs all times alike.
        caption_dropout: share of captions replaced by the empty one.
        ema_decay: of the averaged weights; 0 keeps no average.
        sample_prompts: prompts of the sample grid.
    """

    batch_size: int = 32
    microbatches: int = 1
    train_steps: int = 1000
    image_sizes: tuple[tuple[int, int], ...] = ((32, 32),)
    network: Literal["unet", "mmdit"] = "unet"
    unet: UNetConfig = UNetConfig.preset("shapes")
    mmdit: MMDiTConfig = MMDiTConfig.preset("shapes")
    text: ClipTextConfig = ClipTextConfig.preset("shapes")
    text_workdir: str = ""
    codec: CodecConfig = CodecConfig()
    prediction: Prediction = "velocity"
    timesteps: TimestepConfig = TimestepConfig()
    loss_full_from: float = 0.0
    caption_dropout: float = 0.1
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.999
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sample_prompts: tuple[str, ...] = ("a red circle", "a blue square", "two green stars", "a ring above a cross")


class Examined(NamedTuple):
    """A prediction: `v` `[B, h, w, c]` at `x_t` `[B, h, w, c]`, given `context`."""

    x_t: jax.Array
    v: jax.Array
    context: TextContext


class FlowMatching:
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = FlowMatchingConfig
    prediction: Prediction
    validation_times: Sequence[float] = VALIDATION_TIMES

    def __init__(self, config: FlowMatchingConfig, platform: Platform):
        """`platform` is the one compiled for; it fixes compute dtype and form of the depthwise convolution."""
        self.config = config
        self.codec = build_codec(config.codec, platform)  # without parameters: see `codec_of`
        self.network_name, self.network_config = config.network, getattr(config, config.network)
        self.text_workdir = config.text_workdir
        channels = {self.codec.latent_shape(size)[-1] for size in config.image_sizes}
        if channels != {self.network_config.latent_channels}:
            raise ValueError(
                f"the codec gives {channels.pop()} latent channels and {config.network}.latent_channels is "
                f"{self.network_config.latent_channels}; make them equal"
            )
        self.prediction, self.full_from = config.prediction, config.loss_full_from
        self.network, self.network_spec = build(for_platform(self.network_config, platform))
        self.text, self.text_spec = build(for_platform(config.text, platform))
        self.optimizer: optax.GradientTransformation = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)

    @property
    def tokenizer_workdir(self) -> str:
        """The run whose tokenizer makes the tokens of a batch; "" to train one on the captions."""
        return self.text_workdir

    @property
    def vocab_size(self) -> int:
        """Token ids must be below this."""
        return self.config.text.vocab_size

    # --- shapes ---

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """`(h, w, c)` of the latent of an image size."""
        return self.codec.latent_shape(size)

    def batch_specs(self) -> dict[str, Tree]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`, `tokens` int32 `[B, L]`, `mask` float32 `[B, L]`."""
        b, length = self.config.batch_size, self.config.text.max_tokens
        return {
            f"{h}x{w}": {
                "image": jax.ShapeDtypeStruct((b, h, w, 3), jnp.uint8),
                "tokens": jax.ShapeDtypeStruct((b, length), jnp.int32),
                "mask": jax.ShapeDtypeStruct((b, length), jnp.float32),
            }
            for h, w in self.config.image_sizes
        }

    def init(self, key: jax.Array) -> TrainState:
        """Draws the network, and its text encoder unless that is frozen."""
        network_key, text_key = jax.random.split(key)
        params = {self.network_name: init(self.network, network_key)}
        if not self.text_workdir:
            params["text"] = init(self.text, text_key)
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": self._new_player(params)}, {})

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from `{player: weights}` of an earlier stage; optimizer, average and schedule begin anew. What the
        earlier stage trained beside these networks is left."""
        new = state.players["model"].params
        params = jax.tree.map(
            lambda new, old: old.astype(new.dtype), new, {name: earlier["model"][name] for name in new}
        )
        return state.replace(players={"model": self._new_player(params)})

    def _new_player(self, params: Tree) -> Player:
        return new_player(params, self.optimizer, ema=self.config.ema_decay > 0)

    def frozen_spec(self) -> Tree:
        """`{"text"}` if the text encoder is that of an earlier run, and `{"codec"}` if the codec is a network."""
        text = {"text": spec_of(self.text)} if self.text_workdir else {}
        codec = self.codec.spec()
        return {**text, **({"codec": codec} if codec else {})}

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Reads the text encoder of `config.text_workdir` and the codec of `config.codec`, where there are such."""
        spec = FlowMatching.frozen_spec(self)
        frozen = {}
        if "text" in spec:
            frozen = load_run(self.text_workdir, {"text": spec["text"]}, mesh=mesh, rules=self.text.config.rules())
        if "codec" in spec:
            frozen["codec"] = load_codec(self.config.codec, self.codec, mesh)
        return frozen

    def codec_of(self, frozen: Tree) -> Codec:
        """The codec, with its parameters where it is a network."""
        return self.codec.bind(frozen.get("codec", {}))

    def trained_codec(self, params: Tree, frozen: Tree) -> Codec:
        """What its images and latents go through."""
        del params
        return self.codec_of(frozen)

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the networks."""
        return [
            *within("text", self.text.config.rules()),
            *within(self.network_name, self.network_config.rules()),
        ]

    # --- training ---

    def encode_text(self, params: Tree, tokens: jax.Array, mask: jax.Array) -> TextContext:
        """`[B, L]` tokens -> what the network attends to."""
        return apply(self.text, params["text"], tokens, mask)

    def predict(self, params: Tree, x_t: jax.Array, t: jax.Array, context: TextContext) -> jax.Array:
        """Velocity `[B, h, w, c]` at `x_t` `[B, h, w, c]` and `t` `[B]`."""
        return self.predict_with_taps(params, x_t, t, context)[0]

    def predict_with_taps(
        self, params: Tree, x_t: jax.Array, t: jax.Array, context: TextContext, taps: Sequence[str] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The velocity, and the named intermediates of the network."""
        return predict(self.network, params[self.network_name], x_t, t, context, self.prediction, taps)

    def condition(self, params: Tree, drawn: Tree) -> TextContext:
        """What the network attends to, of a batch or of drawn captions."""
        return self.encode_text(params, drawn["tokens"], drawn["mask"])

    def loss(self, params: Tree, drawn: Tree) -> tuple[jax.Array, Tree]:
        """Mean loss of examples whose noise, times and captions are drawn.

        Args:
            params: the networks by name, trained and frozen ones, and what `extra` holds.
            drawn: as from `draw`.

        Returns:
            The loss, and what `report` makes of it.
        """
        losses, found, _ = self.examine(params, drawn)
        return jnp.mean(losses), found

    def examine(self, params: Tree, drawn: Tree) -> tuple[jax.Array, Tree, Examined]:
        """The flow matching loss of each example `[B]`, what `report` makes of it, and what it was computed from."""
        context = self.condition(params, drawn)
        x_t = interpolate(drawn["x_0"], drawn["eps"], drawn["t"])
        v = self.predict(params, x_t, drawn["t"], context)
        losses = flow_matching_loss(v, velocity(drawn["x_0"], drawn["eps"])) * self.time_weight(drawn["t"])
        return losses, {}, Examined(x_t, v, context)

    def time_weight(self, t: jax.Array) -> jax.Array | float:
        """Of the velocity's squared error at times `[B]`, see `loss_full_from`."""
        return jnp.square(jnp.minimum(1.0, t / self.full_from)) if self.full_from else 1.0

    def report(self, extra: Tree, found: Tree) -> tuple[Tree, Metrics]:
        """The next `extra`, and further metrics, from what the loss found beside its value."""
        del found
        return extra, {}

    def draw(self, frozen: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """Everything random about one global batch: noise, times, what is left of the conditions."""
        eps_key, time_key, condition_key = jax.random.split(key, 3)
        x_0 = self.clean_latents(frozen, batch)
        return {
            "x_0": x_0,
            "eps": jax.random.normal(eps_key, x_0.shape),
            "t": self.draw_times(time_key, x_0.shape[:1], step),
            **self.draw_condition(frozen, batch, condition_key),
        }

    def draw_times(self, key: jax.Array, shape: tuple[int, ...], step: int | jax.Array) -> jax.Array:
        """Times of training at an update, float32 of the given shape in [0, 1]."""
        return sample_times(key, shape, self.config.timesteps, step / self.config.train_steps)

    def clean_latents(self, frozen: Tree, batch: Tree) -> jax.Array:
        """The latents `[B, h, w, c]` of a batch, without noise."""
        return self.codec_of(frozen).encode(from_uint8(batch["image"]))

    def draw_condition(self, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        """What `condition` takes of a batch: its captions, some of them dropped."""
        del frozen
        caption = {"tokens": batch["tokens"], "mask": batch["mask"]}
        return drop_condition(key, caption, self._null_caption(), self.config.caption_dropout)

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One AdamW step on the loss."""
        return self.learn(state, {**frozen, **state.extra}, self.draw(frozen, batch, key, state.step))

    def parts(self) -> Mapping[str, Part]:
        """ "draw", all that comes before the loss: where there are frozen encoders, mainly what they do."""
        return {"draw": lambda state, frozen, batch, key: self.draw(frozen, batch, key, state.step)}

    def learn(self, state: TrainState, given: Tree, drawn: Tree) -> tuple[TrainState, Metrics]:
        """The step of the player "model", beside what else is given by name: frozen networks, `extra`."""
        player = state.players["model"]
        grads, loss, found = accumulate_gradients(
            lambda params, drawn: self.loss({**given, **params}, drawn), player.params, drawn, self.config.microbatches
        )
        grads, norm = clip_by_joint_norm(grads, self.config.optimizer.clip_norm)
        player = step_player(player, grads, self.optimizer, state.step, self.config.ema_decay)
        extra, further = self.report(state.extra, found)
        rate = jnp.asarray(self.learning_rate(state.step))
        metrics = {"loss": loss, **further, "grad_norm": norm, "learning_rate": rate}
        return state.replace(players={**state.players, "model": player}, extra=extra), metrics

    def _null_caption(self) -> dict[str, np.ndarray]:
        tokens, mask = null_tokens(self.config.text, self.config.text.max_tokens)
        return {"tokens": tokens, "mask": mask}

    # --- use ---

    def generate(
        self,
        params: Tree,
        frozen: Tree,
        conditions: Tree,
        key: jax.Array,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        method: Method | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> dict[str, jax.Array]:
        """Images from captions.

        Args:
            params: `{"model": {"unet", "text"}}`.
            frozen: as from `load_frozen`.
            conditions: `tokens` and `mask` `[B, L]`; optionally `noise` instead of noise from the keys: `[B, h, w, c]`,
                or `[B, steps, h, w, c]` where the method renoises.
            key: `[B]` keys.
            steps, guidance, method, image_size: default to `config.sampling` and the first image size.

        Returns:
            `image` uint8 `[B, H, W, 3]`, `latent` float32 `[B, h, w, c]`, and the `noise` it began with.

        Raises:
            ValueError: the given noise has another shape.
        """
        weights = {**frozen, **params["model"]}
        shape = self.noise_shape(self.latent_shape(image_size or self.config.image_sizes[0]), steps, method)
        noise = conditions["noise"] if "noise" in conditions else initial_noise(key, shape)
        expected = (*key.shape, *shape)
        if noise.shape != expected:
            raise ValueError(f"the noise is {noise.shape}; this method, number of steps and image size take {expected}")
        contexts = self.contexts(weights, conditions)
        latent = self.sample(weights, noise, *contexts, steps=steps, guidance=guidance, method=method)
        return {**self.pictures(frozen, latent), "latent": latent, "noise": noise}

    def contexts(self, params: Tree, conditions: Tree) -> tuple[TextContext, TextContext]:
        """What the network attends to of B conditions, and of none at all, `[1, ...]`."""
        null = {name: jnp.asarray(x)[None] for name, x in self._null_caption().items()}
        return self.condition(params, conditions), self.condition(params, null)

    def pictures(self, frozen: Tree, latent: jax.Array) -> dict[str, jax.Array]:
        """`image` uint8 `[B, H, W, 3]` of latents, for a recipe that decodes them."""
        return {"image": to_uint8(self.codec_of(frozen).decode(latent))}

    def noise_shape(
        self, latent: tuple[int, ...], steps: int | None = None, method: Method | None = None
    ) -> tuple[int, ...]:
        """Of the noise that an image begins with, as its latent; or `(steps, *latent)`, the first and all that is mixed
        in later, where the method renoises."""
        default = self.config.sampling
        return (steps or default.steps, *latent) if (method or default.method) == "renoise" else latent

    def sample(
        self,
        params: Tree,
        noise: jax.Array,
        context: TextContext,
        null_context: TextContext,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        method: Method | None = None,
    ) -> jax.Array:
        """The latent `[B, h, w, c]` that noise of that shape leads to under guidance.

        Args:
            params: `{"unet", ...}`, what `predict` takes.
            noise: float32, `[B, ...]` of `noise_shape`.
            context: of B captions.
            null_context: of the empty caption, one for all.
            steps, guidance, method: default to `config.sampling`.
        """
        default = self.config.sampling

        def denoise(x_t: jax.Array, t: jax.Array, i: jax.Array, carry: Any, c: TextContext) -> tuple[jax.Array, Any]:
            del i
            return self.predict(params, x_t, t, c), carry

        scale = default.guidance if guidance is None else guidance
        guided = with_guidance(denoise, context, null_context, scale)
        times = time_grid(steps or default.steps, default.shift)
        if (method or default.method) == "renoise":
            later = jnp.moveaxis(jnp.roll(noise, -1, axis=1), 1, 0)  # the last interval ends in data and uses none
            return sample(guided, noise[:, 0], times, method="renoise", noise=later)[0]
        return sample(guided, noise, times, method=method or default.method)[0]

    def validation_batch(self, frozen: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        """The clean latents `[B, h, w, c]` of a batch, and what `condition` takes of it."""
        return self.clean_latents(frozen, batch), batch

    def validation_loss(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """Per-example error `[B]` at each of `validation_times`, with the same noise at each; and their mean."""
        weights = {**frozen, **params["model"]}
        x_0, captions = self.validation_batch(frozen, batch)
        eps = jax.random.normal(key, x_0.shape)
        context = self.condition(weights, captions)

        def at(t: jax.Array) -> jax.Array:
            return self.validation_error(weights, x_0, eps, jnp.full(x_0.shape[:1], t), context)

        losses = jax.lax.map(at, jnp.asarray(self.validation_times))  # [T, B]
        by_time = {f"t={t:.2f}": losses[i] for i, t in enumerate(self.validation_times)}
        return {"mean": losses.mean(axis=0), **by_time}

    def validation_error(
        self, params: Tree, x_0: jax.Array, eps: jax.Array, t: jax.Array, context: TextContext
    ) -> jax.Array:
        """`[B]`: the squared error of the velocity."""
        v = self.predict(params, interpolate(x_0, eps, t), t, context)
        return flow_matching_loss(v, velocity(x_0, eps))

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Those that `config.evaluation` names."""
        when = self.config.evaluation
        parts = {
            "validation_loss": {"function": self.validation_loss},
            "sample_grid": {"options": {"prompts": getattr(self.config, "sample_prompts", ())}},
        }
        return [when.spec(name, **parts.get(name, {})) for name in when.names]

    def exports(self) -> ExportPlan:
        """The network, the text encoder and, where it is a network, the decoder; see `_flow_export`."""
        return export_plan(self.config, self.codec, self._null_caption())


def predict(
    network: Network,
    params: Tree,
    x_t: jax.Array,
    t: jax.Array,
    context: TextContext,
    prediction: Prediction = "velocity",
    taps: Sequence[str] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The velocity `[B, h, w, c]` that a network predicts at `x_t` `[B, h, w, c]` and `t` `[B]`, and its named
    intermediates; `prediction` says what its output stands for."""
    out, found = apply(network, params, x_t, time_features(t, network.config.time_width), context, taps=taps)
    return (out if prediction == "velocity" else velocity_from_x0(x_t, out, t)), found


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`[B, *shape]` standard normal, each example from its own key."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


RECIPE = FlowMatching
