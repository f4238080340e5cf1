"""The UNets of Stable Diffusion 1, 2 and XL (Rombach et al. 2022, arXiv 2112.10752; Podell et al. 2023, 2307.01952).

A stage is a list of layers and a layer a list of blocks, by config, so that a method may remove blocks, copy them or
give a stage to each of several outputs. The network can be entered in parts, too:

    conditions = condition(time, context)
    h, skips = way_down(enter(x), conditions)
    h = way_up(middle(h, conditions), skips, conditions)
    output = finish(h)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.attention import mask_bias
from snapgen_jax.networks.layers import Conv, GroupNorm
from snapgen_jax.networks.long_attention import AttentionKernel
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, shard
from snapgen_jax.networks.sd_blocks import Conditions, Downsample, ResidualBlock, Transformer, Upsample
from snapgen_jax.networks.taps import Reuse, Taps
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet_blocks import EmbeddingMLP

__all__ = ["Control", "SDUNet", "SDUNetConfig"]

# First match wins. Kernels are split over their outputs, or over their inputs where the outputs are the residual
# stream; vectors are small and stay whole.
_RULES: Rules = [
    (r"conv_out/kernel$", PartitionSpec(None, None, "fsdp", None)),
    (r"(conv|conv_in|conv_1|conv_2|skip)/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"project_(in|out)/kernel$", PartitionSpec(None, None, None, "fsdp")),  # where it is a convolution
    (r"(key|value|query|inner|embedding|project_in)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|outer|project_out)/kernel$", PartitionSpec("tensor", "fsdp")),
]
Stages = tuple[tuple[str, ...], ...]
_WITH, _WITHOUT = ("ra", "ra"), ("r", "r")


@dataclasses.dataclass(frozen=True)
class SDUNetConfig(Preset):
    """Architecture of an `SDUNet`. The defaults are those of Stable Diffusion 1.5.

    Attributes:
        latent_channels: of the input.
        out_channels: of the output.
        channels: width of each stage; stage 0 has the highest resolution, and each further one half of it.
        down: for each stage its layers on the way down, each a string of blocks: "r" a residual block, "a" a
            transformer. A layer begins with an "r"; what leaves it is a skip of the way up.
        mid: the blocks of the lowest resolution between both ways.
        up: for each stage its layers on the way up, one more than on the way down; each takes a skip.
        heads: of the attention of each stage.
        depth: transformer blocks in a transformer of each stage; the middle has those of the last.
        context_width: of the text states.
        pooled_width: of the pooled vector, which Stable Diffusion XL adds to the time's embedding; 0 for none.
        time_width: of the time features.
        groups: of the group normalisation.
        projection: form of the projections around a transformer's blocks; the published weights have either.
        exact_gelu: as the published weights; without, the approximation that phones have an operator for.
        text_mask: "attend" leaves out what the mask says is padding; "ignore" attends to it, as the reference does.
        attention, attention_chunk: see `long_attention.attend_long`.
        remat: "blocks" keeps only what enters each block for the backward pass.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["sd_unet"] = "sd_unet"
    latent_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down: Stages = (_WITH, _WITH, _WITH, _WITHOUT)
    mid: str = "rar"
    up: Stages = (("ra",) * 3, ("ra",) * 3, ("ra",) * 3, ("r",) * 3)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    depth: tuple[int, ...] = (1, 1, 1, 1)
    context_width: int = 768
    pooled_width: int = 0
    time_width: int = 320
    groups: int = 32
    projection: Literal["conv", "linear"] = "conv"
    exact_gelu: bool = True
    text_mask: Literal["attend", "ignore"] = "ignore"
    attention: AttentionKernel = "whole"
    attention_chunk: int = 512
    remat: Literal["none", "blocks"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd15": {},
        "sd21": {"context_width": 1024, "heads": (5, 10, 20, 20), "projection": "linear"},
        "sdxl": {
            "channels": (320, 640, 1280),
            "down": (_WITHOUT, _WITH, _WITH),
            "up": (("r",) * 3, ("ra",) * 3, ("ra",) * 3),
            "heads": (5, 10, 20),
            "depth": (1, 2, 10),
            "context_width": 2048,
            "pooled_width": 2816,
            "projection": "linear",
        },
        "shapes": {
            "latent_channels": 4,
            "channels": (48, 96),
            "down": (("r",), ("ra", "ra")),
            "up": (("r", "r"), ("ra", "ra", "ra")),
            "heads": (3, 6),
            "depth": (1, 1),
            "context_width": 96,
            "time_width": 48,
            "groups": 8,
            "exact_gelu": False,
        },
        "smoke": {
            "channels": (16, 32),
            "down": (("ra",), ("r", "ra")),
            "up": (("ra", "ra"), ("r", "ra", "ra")),
            "heads": (2, 2),
            "depth": (1, 2),
            "context_width": 24,
            "time_width": 16,
            "groups": 4,
        },
    }

    def __post_init__(self) -> None:
        stages = len(self.channels)
        for name in ("down", "up", "heads", "depth"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"SDUNetConfig: {name} has {len(getattr(self, name))} stages and channels {stages}")
        for name in ("down", "up"):
            for layer in (layer for stage in getattr(self, name) for layer in stage):
                if not re.fullmatch("r[ra]*", layer):
                    raise ValueError(
                        f"SDUNetConfig: the layer {layer!r} of {name} is no residual block 'r' followed by blocks 'r' "
                        "and transformers 'a'"
                    )
        if not re.fullmatch("[ra]*", self.mid):
            raise ValueError(f"SDUNetConfig: mid={self.mid!r} is not made of 'r' and 'a'")
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            if len(up) != len(down) + 1:
                raise ValueError(
                    f"SDUNetConfig: stage {i} has {len(down)} layers on the way down and {len(up)} on the way up; the "
                    "way up takes a skip in each of its layers, and needs one layer more"
                )
        for heads, width in zip(self.heads, self.channels, strict=True):
            if width % heads or width % self.groups:
                raise ValueError(
                    f"SDUNetConfig: a stage of {width} channels with {heads} heads and {self.groups} groups; both must "
                    "divide the channels"
                )

    @property
    def embedding_width(self) -> int:
        """Width of the embedding of the time."""
        return 4 * self.channels[0]

    @property
    def reduction(self) -> int:
        """Sides of a latent are multiples of this."""
        return 2 ** (len(self.channels) - 1)

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the UNet with freshly drawn parameters."""
        return SDUNet(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(
        self, batch: int = 1, height: int = 64, width: int = 64, tokens: int = 77
    ) -> tuple[Any, Any, TextContext]:
        """`ShapeDtypeStruct`s of the positional arguments: latent, time features, text. `height` and `width` are the
        latent's."""

        def array(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        context = TextContext(
            array(batch, tokens, self.context_width), array(batch, tokens), array(batch, self.pooled_width)
        )
        return array(batch, height, width, self.latent_channels), array(batch, self.time_width), context

    def block_names(self) -> tuple[str, ...]:
        """Of every block, in the order in which they run: `down_1_0_2` is block 2 of layer 0 of stage 1, `mid_0` the
        first of the middle."""
        return tuple(name for name in self.tap_names() if re.fullmatch(r"(down|up)_\d+_\d+_\d+|mid_\d+", name))

    def tap_names(self) -> tuple[str, ...]:
        """Names of the intermediates in the order in which they are computed.

        Beside the blocks (`block_names`): `down_1_0` is the output of layer 0 of stage 1 on the way down, `down_1` that
        of its last layer; stage 0 has the highest resolution on both ways.
        """
        names, last = ["conv_in"], len(self.channels) - 1
        for stage, layers in enumerate(self.down):
            names += [*_layer_names("down", stage, layers), f"down_{stage}"]
            names += [f"downsample_{stage}"] if stage < last else []
        names += [*(f"mid_{i}" for i in range(len(self.mid))), "mid"]
        for stage, layers in reversed([*enumerate(self.up)]):
            names += [*_layer_names("up", stage, layers), f"up_{stage}"]
            names += [f"upsample_{stage}"] if stage else []
        return tuple(names)


def _layer_names(way: str, stage: int, layers: Sequence[str]) -> list[str]:
    names = []
    for i, layer in enumerate(layers):
        names += [*(f"{way}_{stage}_{i}_{j}" for j in range(len(layer))), f"{way}_{stage}_{i}"]
    return names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Control:
    """What a second network adds (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models").

    Attributes:
        skips: to each skip, in the order in which they are made: `conv_in`, the layers and samplers of the way down.
        mid: to the output of the middle.
    """

    skips: tuple[jax.Array, ...]
    mid: jax.Array


class SDUNet(nnx.Module):
    """What a diffusion model predicts of a noisy latent, given its time and a text. Build it through
    `networks.module.build`."""

    def __init__(self, config: SDUNetConfig, rngs: nnx.Rngs):
        dtype, channels = compute_dtype(config), config.channels
        self.config = config
        self.time = EmbeddingMLP(config.time_width, config.embedding_width, dtype=dtype, rngs=rngs)
        self.pooled = (
            EmbeddingMLP(config.pooled_width, config.embedding_width, dtype=dtype, rngs=rngs)
            if config.pooled_width
            else None
        )
        self.conv_in = Conv(config.latent_channels, channels[0], dtype=dtype, rngs=rngs)

        width, skips = channels[0], [channels[0]]
        self.down, self.downsamplers = nnx.List(), nnx.List()
        for stage, layers in enumerate(config.down):
            stack = nnx.List()
            for layer in layers:
                stack.append(self._layer(layer, stage, width, rngs))
                width = channels[stage]
                skips.append(width)
            self.down.append(stack)
            if stage < len(channels) - 1:
                self.downsamplers.append(Downsample(width, dtype, rngs))
                skips.append(width)

        self.mid = self._layer(config.mid, len(channels) - 1, width, rngs)

        # Lists are indexed by stage, so the way up is built and stored from the highest resolution like the way down.
        up: list[nnx.List] = []
        upsamplers: list[Upsample] = []
        for stage in reversed(range(len(channels))):
            stack = nnx.List()
            for layer in config.up[stage]:
                stack.append(self._layer(layer, stage, width + skips.pop(), rngs))
                width = channels[stage]
            up.insert(0, stack)
            if stage:
                upsamplers.insert(0, Upsample(width, dtype, rngs))
        self.up, self.upsamplers = nnx.List(up), nnx.List(upsamplers)

        self.norm_out = GroupNorm(width, config.groups, dtype=dtype)
        self.conv_out = Conv(width, config.out_channels, init="zeros", dtype=dtype, rngs=rngs)

    def _layer(self, layer: str, stage: int, in_width: int, rngs: nnx.Rngs) -> nnx.List:
        config, width, blocks = self.config, self.config.channels[stage], nnx.List()
        for block in layer:
            if block == "r":
                blocks.append(
                    ResidualBlock(
                        in_width, width, config.embedding_width, groups=config.groups, dtype=compute_dtype(config),
                        rngs=rngs,
                    )
                )  # fmt: skip
                in_width = width
            else:
                blocks.append(Transformer(config, width, config.heads[stage], config.depth[stage], rngs))
        return blocks

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        context: TextContext,
        *,
        taps: Sequence[str] = (),
        reuse: Mapping[str, Reuse | jax.Array] | None = None,
        control: Control | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts what the network was trained to: noise, v, or the data.

        Args:
            x: `[B, H, W, C]` noisy latent; H and W multiples of `config.reduction`.
            time: `[B, time_width]` from `time_features` of the native step.
            context: sequence `[B, L, context_width]`, mask `[B, L]`, pooled `[B, pooled_width]`.
            taps: names of intermediates to return; `config.tap_names()` lists them.
            reuse: intermediates to use in place of the network's own, always or where `Reuse.run` says.
            control: what is added to the skips and to the middle.

        Returns:
            output: `[B, H, W, out_channels]` float32.
            intermediates: `{name: [B, h, w, c]}` in the compute dtype.

        Raises:
            ValueError: a shape does not fit the config, a name is unknown, or the control has another number of skips.
        """
        _check_inputs(self.config, x, time, context)
        tap = Taps(self.config.tap_names(), taps, reuse)
        conditions = self.condition(time, context)
        h, skips = self.way_down(tap.module("conv_in", self.enter, x), conditions, tap=tap)
        h = tap.module("mid", self.middle, h, conditions, tap)
        if control is not None:
            if len(control.skips) != len(skips):
                raise ValueError(f"the control has {len(control.skips)} skips, and the network {len(skips)}")
            skips = [skip + added.astype(skip.dtype) for skip, added in zip(skips, control.skips, strict=True)]
            h = h + control.mid.astype(h.dtype)
        h = self.way_up(h, skips, conditions, tap=tap)
        return self.finish(h), tap.found

    def condition(self, time: jax.Array, context: TextContext) -> Conditions:
        """What the blocks are told, of time features `[B, time_width]` and a text."""
        embedding = self.time(time)
        if self.pooled is not None:
            embedding = embedding + self.pooled(context.pooled)
        bias = mask_bias(context.mask) if self.config.text_mask == "attend" else None
        states = context.sequence.astype(compute_dtype(self.config))
        return Conditions(shard(jax.nn.silu(embedding), "vector"), shard(states, "tokens"), bias)

    def enter(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, latent_channels] -> [B, H, W, channels[0]]`, the first skip."""
        return shard(self.conv_in(shard(x, "image")), "image")

    def way_down(
        self,
        h: jax.Array,
        conditions: Conditions,
        first: int = 0,
        last: int | None = None,
        *,
        tap: Taps | None = None,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Stages `first` up to, not including, `last` (all further ones by default), each with its downsampler.

        Returns:
            h: of the first stage that did not run.
            skips: in the order in which they are made; that of `enter` is the first where the first stage ran.
        """
        tap, stages = tap or _no_taps(self.config), len(self.config.channels)
        skips = [] if first else [h]
        for stage in range(first, stages if last is None else last):
            for i, layer in enumerate(self.down[stage]):
                names = [f"down_{stage}_{i}", *([f"down_{stage}"] if i == len(self.down[stage]) - 1 else [])]
                h = tap.module(names, self._run, h, layer, f"down_{stage}_{i}", conditions, tap)
                skips.append(h)
            if stage < stages - 1:
                h = tap.module(f"downsample_{stage}", self.downsamplers[stage], h)
                skips.append(h)
        return h, skips

    def middle(self, h: jax.Array, conditions: Conditions, tap: Taps | None = None) -> jax.Array:
        """The lowest resolution: `[B, h, w, C] -> [B, h, w, C]`."""
        return self._run(h, self.mid, "mid", conditions, tap or _no_taps(self.config))

    def way_up(
        self,
        h: jax.Array,
        skips: Sequence[jax.Array],
        conditions: Conditions,
        first: int | None = None,
        last: int = 0,
        *,
        tap: Taps | None = None,
    ) -> jax.Array:
        """Stages `first` (the lowest resolution by default) down to `last`, each with its upsampler.

        Args:
            h: what enters the stage `first`.
            skips: at least those that these stages take, in the order of `way_down`; the last is taken first.
            conditions: of `condition`.
            first: where to begin.
            last: where to end.
            tap: what is returned or replaced.
        """
        tap, skips = tap or _no_taps(self.config), list(skips)
        for stage in range(len(self.config.channels) - 1 if first is None else first, last - 1, -1):
            for i, layer in enumerate(self.up[stage]):
                joined = jnp.concatenate([h, skips.pop()], axis=-1)
                names = [f"up_{stage}_{i}", *([f"up_{stage}"] if i == len(self.up[stage]) - 1 else [])]
                h = tap.module(names, self._run, joined, layer, f"up_{stage}_{i}", conditions, tap)
            if stage:
                h = tap.module(f"upsample_{stage}", self.upsamplers[stage - 1], h)
        return h

    def finish(self, h: jax.Array) -> jax.Array:
        """`[B, H, W, channels[0]] -> [B, H, W, out_channels]` float32."""
        return shard(self.conv_out(jax.nn.silu(self.norm_out(h))).astype(jnp.float32), "image")

    def _run(self, h: jax.Array, blocks: nnx.List, name: str, conditions: Conditions, tap: Taps) -> jax.Array:
        for i, block in enumerate(blocks):
            run = jax.checkpoint(block) if self.config.remat == "blocks" else block
            h = tap.module(f"{name}_{i}", run, h, conditions)
        return h


def _no_taps(config: SDUNetConfig) -> Taps:
    return Taps(config.tap_names(), (), None)


def _check_inputs(config: SDUNetConfig, x: jax.Array, time: jax.Array, context: TextContext) -> None:
    _, h, w, _ = x.shape
    if h % config.reduction or w % config.reduction:
        raise ValueError(
            f"SDUNet: a latent of {h} x {w} does not divide by {config.reduction}, as {len(config.channels)} stages "
            "need; change the image size"
        )
    for name, given, expected in (
        ("latent channels", x.shape[-1], config.latent_channels),
        ("time features", time.shape[-1], config.time_width),
        ("text state width", context.sequence.shape[-1], config.context_width),
        ("pooled text width", context.pooled.shape[-1] if config.pooled_width else 0, config.pooled_width),
    ):
        if given != expected:
            raise ValueError(f"SDUNet: {name} {given} given, but the config says {expected}")
