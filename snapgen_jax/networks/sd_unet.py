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
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.attention_kernels import key_mask, real_first
from snapgen_jax.networks.attention_table import kernel_of
from snapgen_jax.networks.layers import Conv, GroupNorm
from snapgen_jax.networks.module import compute_dtype, shard
from snapgen_jax.networks.sd_blocks import Conditions, Downsample, ResidualBlock, Transformer, Upsample
from snapgen_jax.networks.sd_unet_config import WITH, WITHOUT, SDUNetArchitecture
from snapgen_jax.networks.taps import Reuse, Taps
from snapgen_jax.networks.text import TextContext, check_widths, denoiser_spec
from snapgen_jax.networks.unet_blocks import EmbeddingMLP

__all__ = ["Control", "SDUNet", "SDUNetConfig"]

Way = Literal["down", "mid", "up"]


@dataclasses.dataclass(frozen=True)
class SDUNetConfig(SDUNetArchitecture):
    """Architecture of an `SDUNet`; `sd_unet_config.SDUNetArchitecture` says what each field is."""

    kind: Literal["sd_unet"] = "sd_unet"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd15": {},
        # SnapFusion's (Li et al. 2023, arXiv 2306.00980, table 3), with its four residual blocks at the lowest
        # resolution as one on the way down, one in the middle and two on the way up.
        "snapfusion": {
            "down": (("r", "r"), ("ra", "ra"), ("raa",), ("r",)),
            "mid": "ra",
            "up": (("r",) * 3, ("ra",) * 3, ("raaa",) * 2, ("r",) * 2),
        },
        "sd21": {"context_width": 1024, "heads": (5, 10, 20, 20), "projection": "linear"},
        "sdxl": {
            "channels": (320, 640, 1280),
            "down": (WITHOUT, WITH, WITH),
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

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the UNet with freshly drawn parameters."""
        return SDUNet(self, rngs)

    def input_spec(
        self, batch: int = 1, height: int = 64, width: int = 64, tokens: int = 77
    ) -> tuple[Any, Any, TextContext]:
        """`ShapeDtypeStruct`s of the positional arguments: latent, time features, text. `height` and `width` are the
        latent's."""
        return denoiser_spec(self, batch, (height, width), tokens)


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

    def __init__(self, config: SDUNetArchitecture, rngs: nnx.Rngs):
        dtype, channels = compute_dtype(config), config.channels
        self.config = config
        self.time = EmbeddingMLP(config.time_width, config.embedding_width, dtype=dtype, rngs=rngs)
        self.activation = jax.nn.silu  # of the embedding
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
                stack.append(self._layer(layer, "down", stage, width, rngs))
                width = channels[stage]
                skips.append(width)
            self.down.append(stack)
            if stage < len(channels) - 1:
                self.downsamplers.append(Downsample(width, dtype, rngs))
                skips.append(width)

        self.mid = self._layer(config.mid, "mid", len(channels) - 1, width, rngs)

        # Lists are indexed by stage, so the way up is built and stored from the highest resolution like the way down.
        up: list[nnx.List] = []
        upsamplers: list[Upsample] = []
        for stage in reversed(range(len(channels))):
            stack = nnx.List()
            for layer in config.up[stage]:
                stack.append(self._layer(layer, "up", stage, width + skips.pop(), rngs))
                width = channels[stage]
            up.insert(0, stack)
            if stage:
                upsamplers.insert(0, Upsample(width, dtype, rngs))
        self.up, self.upsamplers = nnx.List(up), nnx.List(upsamplers)

        self.norm_out = GroupNorm(width, config.groups, dtype=dtype)
        self.conv_out = Conv(width, config.out_channels, init="zeros", dtype=dtype, rngs=rngs)

    def _layer(self, layer: str, way: Way, stage: int, in_width: int, rngs: nnx.Rngs) -> nnx.List:
        blocks, width = nnx.List(), self.config.channels[stage]
        for block in layer:
            if block == "r":
                blocks.append(self._residual(in_width, width, way, "a" in layer, rngs))
                in_width = width
            else:
                blocks.append(self._transformer(stage, rngs))
        return blocks

    def _residual(self, in_width: int, width: int, way: Way, attends: bool, rngs: nnx.Rngs) -> nnx.Module:
        """A residual block; `attends`: whether its layer has a transformer."""
        del way, attends
        config = self.config
        return ResidualBlock(
            in_width, width, config.embedding_width, groups=config.groups, dtype=compute_dtype(config), rngs=rngs
        )

    def _transformer(self, stage: int, rngs: nnx.Rngs) -> nnx.Module:
        config = self.config
        return Transformer(config, config.channels[stage], config.heads[stage], config.depth[stage], rngs)

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
        check_inputs(self.config, x, time, context)
        return self._predict(x, self.condition(time, context), Taps(self.config.tap_names(), taps, reuse), control)

    def _predict(
        self, x: jax.Array, conditions: Conditions, tap: Taps, control: Control | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
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
        states, mask = context.sequence, None
        if self.config.text_mask == "attend":
            kernel = kernel_of(self.config)
            states, real = real_first(kernel, states, context.mask)
            mask = key_mask(kernel, real)
        states = states.astype(compute_dtype(self.config))
        return Conditions(shard(self.activation(embedding), "vector"), shard(states, "tokens"), mask)

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


def _no_taps(config: SDUNetArchitecture) -> Taps:
    return Taps(config.tap_names(), (), None)


def check_inputs(config: SDUNetArchitecture, x: jax.Array, time: jax.Array, context: TextContext) -> None:
    """Raises ValueError where the inputs of a UNet, `x` `[..., H, W, C]`, do not fit its config."""
    h, w = x.shape[-3:-1]
    if h % config.reduction or w % config.reduction:
        raise ValueError(
            f"{type(config).__name__}: a latent of {h} x {w} does not divide by {config.reduction}, as "
            f"{len(config.channels)} stages need; change the image size"
        )
    check_widths(
        type(config).__name__,
        ("latent channels", x.shape[-1], config.latent_channels),
        ("time features", time.shape[-1], config.time_width),
        ("text state width", context.sequence.shape[-1], config.context_width),
        ("pooled text width", context.pooled.shape[-1] if config.pooled_width else 0, config.pooled_width),
    )
