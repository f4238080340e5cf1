"""A paper that is none of ours: a network that mixes the frames of clips is adapted to a task by a low-rank update.

    y_f = sum_g (W + B A)_fg h(x_g),   L = || y - reverse(x) ||^2

W is frozen and of an earlier run (or trained here, where `base_workdir` is empty); A and B are the adapter (Hu et al.
2021), which `weights` merges; h is a network that is trained beside it. It is fed with clips, draws no noise, and is
exported as one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.networks.module import Network, Platform, Preset, apply, build, frozen_spec, init
from snapgen_jax.networks.rules import Rules, rules_of
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import Metrics, NoOptions, Part, Use
from snapgen_jax.training.state import TrainState
from snapgen_jax.weights.frozen import load_run

Tree = Any


# --- its networks ---


@dataclasses.dataclass(frozen=True)
class MixerConfig(Preset):
    """Mixes F frames: a matrix over them, the same for all pixels."""

    kind: Literal["mixer"] = "mixer"
    frames: int = 4
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        return Mixer(self, rngs)

    def rules(self) -> Rules:
        return []

    def input_spec(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((batch, self.frames, 192), jnp.float32),)


class Mixer(nnx.Module):
    def __init__(self, config: MixerConfig, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.1 * jax.random.normal(rngs.params(), (config.frames, config.frames)))

    def __call__(self, clip: jax.Array) -> jax.Array:
        """`[B, F, N]`, N numbers a frame, -> the same."""
        return jnp.einsum("fg,bgn->bfn", self.kernel[...].astype(jnp.float32), clip)


@dataclasses.dataclass(frozen=True)
class HeadConfig(Preset):
    """Scales and shifts colours, frame by frame: frames are folded into the batch."""

    kind: Literal["head"] = "head"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        return Head()

    def rules(self) -> Rules:
        return []

    def input_spec(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32),)


class Head(nnx.Module):
    def __init__(self):
        self.kernel, self.bias = nnx.Param(jnp.eye(3)), nnx.Param(jnp.zeros(3))

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B F, H, W, 3]` -> the same."""
        return images @ self.kernel[...] + self.bias[...]


# --- what it is fed ---


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """Clips `[F, H, W, 3]`."""

    kind: Literal["clips"] = "clips"
    frames: int = 4
    size: int = 8

    def build(self, batch_size: int, platform: Platform) -> Clips:
        del platform
        return Clips(self, batch_size)


class Clips:
    """Implements `inputs.interfaces.Inputs`; it brings no network."""

    def __init__(self, config: ClipsConfig, batch_size: int):
        self.config, self.batch_size = config, batch_size

    def batch_specs(self):
        shape = (self.batch_size, *self.latent_shape())
        return {"clip": {"clip": jax.ShapeDtypeStruct(shape, jnp.uint8)}}

    def latent_shape(self, size=None):
        side = self.config.size
        return self.config.frames, side, side, 3

    def conditions(self):
        return ("clip",)

    def networks(self):
        return {}

    def pretrained(self):
        return ()

    def load(self, roles, mesh):
        return {}

    def tokenizers(self):
        return {}

    def clean(self, networks, batch):
        return batch["clip"].astype(jnp.float32) / 127.5 - 1

    def integer_bounds(self):
        return {}

    def unconditional_share(self):
        return 0.0

    def draw_kept(self, key, batch_size):
        return {}

    def draw_condition(self, networks, batch, key, kept):
        return {"clip": self.clean(networks, batch)}

    def condition(self, networks, drawn):
        return drawn["clip"]

    def null_condition(self, networks):
        return jnp.zeros((1, *self.latent_shape()))

    def decode(self, networks, x_0):
        return {"clip": jnp.round(jnp.clip(x_0 * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)}

    def codec(self, networks):
        raise ConfigError("clips go through no codec")

    def check_run(self, workdir, inputs, parts):
        del workdir, inputs, parts

    def check_batch(self, arrays):
        del arrays

    def exports(self):
        raise ConfigError("the recipe exports one unit, which takes the clip itself")


# --- the method ---


@dataclasses.dataclass(frozen=True)
class ClipAdapterConfig:
    """Attributes:
    base_workdir: the run whose mixer is adapted; "" trains the mixer itself, to leave clips as they are.
    rank: of the adapter.
    """

    batch_size: int = 8
    microbatches: int = 1
    train_steps: int = 10
    inputs: ClipsConfig = ClipsConfig()
    base_workdir: str = ""
    rank: int = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=0.05, warmup_steps=0)
    evaluation: EvaluationConfig = EvaluationConfig(during=(), final=())


class ClipAdapter:
    """Implements `training.recipe.Recipe`."""

    Config = ClipAdapterConfig
    options = NoOptions()

    def __init__(self, config: ClipAdapterConfig, platform: Platform):
        self.config = config
        self.inputs = config.inputs.build(config.batch_size, platform)
        self.mixer, self.head = build(MixerConfig(frames=config.inputs.frames))[0], build(HeadConfig())[0]
        self.trains = {"model": ("adapter", "head") if config.base_workdir else ("mixer",)}
        self.optimizer = make_optimizer(config.optimizer, config.train_steps)

    def networks(self) -> dict[str, Network]:
        return {"mixer": self.mixer, "head": self.head}

    def batch_specs(self):
        return self.inputs.batch_specs()

    def tokenizers(self):
        return self.inputs.tokenizers()

    def conditions(self) -> tuple[str, ...]:
        return self.inputs.conditions()

    def init(self, key: jax.Array) -> TrainState:
        if not self.config.base_workdir:
            params = {"mixer": init(self.mixer, key)}
        else:
            f, rank = self.config.inputs.frames, self.config.rank
            adapter = {"a": jax.random.normal(key, (rank, f)), "b": jnp.zeros((f, rank))}
            params = {"adapter": adapter, "head": init(self.head, key)}
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": new_player(params, self.optimizer, ema=False)}, {})

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        del earlier
        return state

    def frozen_spec(self) -> Tree:
        return {"mixer": frozen_spec(self.mixer)} if self.config.base_workdir else {}

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        del use
        return load_run(self.config.base_workdir, self.frozen_spec(), mesh=mesh) if self.config.base_workdir else {}

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        model = params["model"]
        if "adapter" not in model:
            return dict(model)
        update = model["adapter"]["b"] @ model["adapter"]["a"]
        return {"mixer": {"kernel": frozen["mixer"]["kernel"] + update}, "head": model["head"]}

    def mapped(self, networks: Tree, frames: jax.Array) -> jax.Array:
        """Frames of B clips, folded into the batch: `[B F, H, W, 3]` -> the same."""
        mixed = apply(self.head, networks["head"], frames) if "head" in networks else frames
        mixed = mixed.reshape(-1, self.config.inputs.frames, frames[0].size)
        return apply(self.mixer, networks["mixer"], mixed).reshape(frames.shape)

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        del key
        player, clip = state.players["model"], self.inputs.clean({}, batch)
        target = clip[:, ::-1] if self.config.base_workdir else clip

        def loss(params: Tree) -> jax.Array:
            mapped = self.mapped(self.weights({"model": params}, frozen), clip.reshape(-1, *clip.shape[2:]))
            return jnp.mean(jnp.square(mapped.reshape(clip.shape) - target))

        value, grads = jax.value_and_grad(loss)(player.params)
        clip_norm = self.config.optimizer.clip_norm
        player, norm = step_player(player, grads, self.optimizer, state.step, clip_norm=clip_norm)
        return state.replace(players={"model": player}), {"loss": value, "grad_norm": norm}

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: NoOptions
    ) -> dict[str, jax.Array]:
        del keys, options
        networks = self.weights(params, frozen)
        clip = self.inputs.clean(networks, conditions)
        mapped = self.mapped(networks, clip.reshape(-1, *clip.shape[2:]))
        return {"reversed": self.inputs.decode(networks, mapped.reshape(clip.shape))["clip"]}

    def codec(self, params: Tree, frozen: Tree) -> Any:
        return self.inputs.codec(self.weights(params, frozen))

    def parts(self) -> Mapping[str, Part]:
        return {}

    def exports(self) -> ExportPlan:
        shape = self.inputs.latent_shape()

        def run(weights: Tree, *, clip: Any) -> dict[str, jax.Array]:
            return {"reversed": self.mapped(weights, clip)}

        roles = ("mixer", "head") if self.config.base_workdir else ("mixer",)
        unit = ExportUnit("adapter", run, roles, {"clip": jax.ShapeDtypeStruct(shape, jnp.float32)})
        program = {
            "schema": 3,
            "kind": "feed_forward",
            "unit": "adapter",
            "inputs": {"clip": {"shape": list(shape), "dtype": "uint8"}},
            "outputs": {"reversed": {"shape": list(shape), "dtype": "uint8"}},
        }
        clips = jax.random.randint(jax.random.key(0), (2, *shape), 0, 256).astype(jnp.uint8)
        return ExportPlan([unit], program, GoldenInputs(arrays={"clip": jax.device_get(clips)}))

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        return [self.config.evaluation.spec(name) for name in self.config.evaluation.names]

    def rules(self):
        return rules_of(self.networks())


def rank_of(stages, workdir, options) -> dict[str, Any]:
    """A derived stage: of the ranks asked for, the least that can reverse the frames of the mixer that was trained."""
    del workdir
    import numpy as np

    base = load_run(stages["base"], {"mixer": frozen_spec(build(MixerConfig(frames=options["frames"]))[0])})
    needed = np.eye(options["frames"])[::-1] - np.asarray(base["mixer"]["kernel"])
    singular = np.linalg.svd(needed, compute_uv=False)
    return {"adapter": {"rank": int(next(r for r in options["ranks"] if (singular[r:] < 0.3).all()))}}


RECIPE = ClipAdapter
