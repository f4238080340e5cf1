"""The SnapGen UNet (arXiv 2412.09619, section 3.1): a thin latent-diffusion UNet for phones.

Stages go down in resolution and up again; each holds units of a residual block (separable convolutions) and a
transformer (multi-query attention, cross-attention to the text). Every output on the way down is concatenated to an
input on the way up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks import remat
from snapgen_jax.networks.attention import rope_table
from snapgen_jax.networks.attention_kernels import Mask, key_mask, real_first
from snapgen_jax.networks.attention_table import kernel_of
from snapgen_jax.networks.layers import Conv, GroupNorm
from snapgen_jax.networks.module import Rules, compute_dtype, shard
from snapgen_jax.networks.taps import Reuse, Taps
from snapgen_jax.networks.text import TextContext, denoiser_spec
from snapgen_jax.networks.unet_blocks import (
    Downsample,
    EmbeddingMLP,
    ResidualBlock,
    Rope,
    Transformer,
    Unit,
    Upsample,
    run_standing,
    standing,
)
from snapgen_jax.networks.unet_config import UNetArchitecture

__all__ = ["UNet", "UNetConfig"]

_MIDDLE = ("mid_residual_block", "mid_transformer", "mid_second_residual_block")

# First match wins. Kernels are split over their outputs, or over their inputs where the outputs are the residual
# stream; vectors are small and stay whole.
_RULES: Rules = [
    (r"depthwise/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"conv_out/kernel$", PartitionSpec(None, None, "fsdp", None)),
    (r"(conv|conv_in|conv_1|conv_2|skip|pointwise)/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"(key|value)/kernel$", PartitionSpec("fsdp", None)),
    (r"(out|outer|project_out)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(query|inner|project_in|embedding)/kernel$", PartitionSpec("fsdp", "tensor")),
]


@dataclasses.dataclass(frozen=True)
class UNetConfig(UNetArchitecture):
    """Architecture of a `UNet`; `unet_config.UNetArchitecture` says what each field is."""

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the UNet with freshly drawn parameters."""
        return UNet(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(
        self, batch: int = 1, height: int = 32, width: int = 32, tokens: int = 77
    ) -> tuple[Any, Any, TextContext]:
        """`ShapeDtypeStruct`s of a UNet's positional arguments: latent, time features, text.

        `height` and `width` are the latent's.
        """
        return denoiser_spec(self, batch, (height, width), tokens)

    def tap_names(self) -> tuple[str, ...]:
        """Names of a UNet's intermediates in the order in which they are computed.

        `down_1_0` is the output of unit 0 of stage 1 on the way down, `down_1` that of its last unit; stage 0 has the
        highest resolution on both ways. Inside a unit, `down_1_0_block_0_ffn` is what a module of a transformer block
        adds, `[B, h * w, c]`, and `down_1_0_residual` what the convolutions add, `[B, h, w, c]`; the same names with
        `_input` are what enters, which before a transformer's modules is normalised.
        """
        names, stages = ["conv_in"], len(self.channels)

        def units(way: str, stage: int, count: int, depth: int, residual: bool) -> list[str]:
            inner = [*(["residual"] if residual else []), *self._of_transformer(stage, depth)]
            return [
                name for i in range(count) for name in (*_inside(f"{way}_{stage}_{i}", inner), f"{way}_{stage}_{i}")
            ]

        for stage in range(stages):
            names += [*units("down", stage, self.units, *self.down_unit(stage)), f"down_{stage}"]
            names += [f"downsample_{stage}"] if stage < stages - 1 else []
        middle = ["residual", *self._of_transformer(stages - 1, self.mid_depth)]
        names += [*_inside("mid", middle + ["second_residual"] * (self.mid == "rar")), "mid"]
        for stage in reversed(range(stages)):
            names += [*units("up", stage, self.units + 1, self.up_depth[stage], True), f"up_{stage}"]
            names += [f"upsample_{stage}"] if stage else []
        return tuple(names)

    def _of_transformer(self, stage: int, depth: int) -> list[str]:
        """The modules of the transformer blocks of a unit."""
        modules = [
            *(["self_attention"] if self.self_attention[stage] else []),
            *(["cross_attention"] if self.cross_attention[stage] else []),
            "ffn",
        ]
        return [f"block_{i}_{module}" for i in range(depth) for module in modules]


def _inside(block: str, modules: Sequence[str]) -> list[str]:
    """Names of what enters and leaves the modules of a block."""
    return [name for module in modules for name in (f"{block}_{module}_input", f"{block}_{module}")]


class UNet(nnx.Module):
    """Velocity of a noisy latent, given its time and a text. Build it through `networks.module.build`."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        dtype, channels, last = compute_dtype(config), config.channels, len(config.channels) - 1
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
        for stage, channel in enumerate(channels):
            depth, residual = config.down_unit(stage)
            units = nnx.List()
            for i in range(config.units):
                units.append(Unit(config, f"down_{stage}_{i}", stage, width, depth, residual, rngs))
                width = channel
                skips.append(width)
            self.down.append(units)
            if stage < last:
                self.downsamplers.append(Downsample(config, width, rngs))
                skips.append(width)

        def residual_block(first: bool) -> nnx.Module:
            return ResidualBlock(config, width, width, rngs)

        def transformer(first: bool) -> nnx.Module:
            return Transformer(config, last, config.mid_depth, rngs)

        counts = {name: config.count(name) if name in config.base_blocks() else 0 for name in _MIDDLE}
        self.mid_residual, self.mid_more_residuals = standing(counts["mid_residual_block"], residual_block)
        self.mid_transformer, self.mid_more_transformers = standing(counts["mid_transformer"], transformer)
        self.mid_residual_2, self.mid_more_residuals_2 = standing(counts["mid_second_residual_block"], residual_block)

        # Lists are indexed by stage, so the way up is built and stored from the highest resolution like the way down.
        up_units: list[nnx.List] = []
        upsamplers: list[Upsample] = []
        for stage in reversed(range(len(channels))):
            units = nnx.List()
            for i in range(config.units + 1):
                name, depth = f"up_{stage}_{i}", config.up_depth[stage]
                units.append(Unit(config, name, stage, width + skips.pop(), depth, True, rngs))
                width = channels[stage]
            up_units.insert(0, units)
            if stage:
                upsamplers.insert(0, Upsample(config, width, rngs))
        self.up, self.upsamplers = nnx.List(up_units), nnx.List(upsamplers)

        self.norm_out = GroupNorm(width, config.groups, dtype=dtype)
        self.conv_out = Conv(width, config.latent_channels, init="zeros", dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        context: TextContext,
        *,
        taps: Sequence[str] = (),
        reuse: Mapping[str, Reuse | jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts the velocity.

        Args:
            x: `[B, H, W, C]` noisy latent; H and W multiples of `config.reduction`.
            time: `[B, time_width]` from `time_features`.
            context: sequence `[B, L, context_width]`, mask `[B, L]`, pooled `[B, pooled_width]`.
            taps: names of intermediates to return; `config.tap_names()` lists them.
            reuse: intermediates to use in place of the network's own, always or where `Reuse.run` says; also by the
                names of `config.droppable_blocks()`. Inside a unit whose intermediates are tapped everything runs, even
                where the unit itself is replaced.

        Returns:
            v: `[B, H, W, C]` float32.
            intermediates: `{name: [B, h, w, c]}`, or `[B, h * w, c]` in transformers, in the compute dtype.

        Raises:
            ValueError: a shape does not fit the config, or a name is unknown.
        """
        config, stages = self.config, len(self.config.channels)
        _check_inputs(config, x, time, context)
        tap = Taps((*config.tap_names(), *config.droppable_blocks()), taps, reuse)

        embedding = self.time(time)
        if self.pooled is not None:
            embedding = embedding + self.pooled(context.pooled)
        embedding = self.activation(embedding)
        kernel = kernel_of(config)
        states, mask = real_first(kernel, context.sequence.astype(compute_dtype(config)), context.mask)
        keys = key_mask(kernel, mask)

        recomputed = functools.partial(remat.unit, config.remat)
        h = tap.module("conv_in", lambda x: shard(self.conv_in(shard(x, "image")), "image"), x)
        skips = [h]
        for stage, units in enumerate(self.down):
            rope = _rope(config, stage, h)
            for i, unit in enumerate(units):
                names = [f"down_{stage}_{i}", *([f"down_{stage}"] if i == config.units - 1 else [])]
                h = tap.block(names, unit, h, embedding, states, keys, rope, remat=recomputed)
                skips.append(h)
            if stage < stages - 1:
                h = tap.module(f"downsample_{stage}", self.downsamplers[stage], h)
                skips.append(h)

        h = tap.block("mid", self._middle, h, embedding, states, keys)

        for stage in reversed(range(stages)):
            rope = _rope(config, stage, h)
            for i, unit in enumerate(self.up[stage]):
                joined = jnp.concatenate([h, skips.pop()], axis=-1)
                names = [f"up_{stage}_{i}", *([f"up_{stage}"] if i == config.units else [])]
                h = tap.block(names, unit, joined, embedding, states, keys, rope, remat=recomputed)
            if stage:
                upsample = remat.block(config.remat, self.upsamplers[stage - 1])
                h = tap.module(f"upsample_{stage}", upsample, h)

        v = remat.block(config.remat, lambda h: self.conv_out(jax.nn.silu(self.norm_out(h))))(h)
        return shard(v.astype(jnp.float32), "image"), tap.found

    def _middle(self, h: jax.Array, embedding: jax.Array, states: jax.Array, keys: Mask, tap: Taps) -> jax.Array:
        """The lowest resolution: `[B, h, w, C] -> [B, h, w, C]`."""
        rope = _rope(self.config, len(self.config.channels) - 1, h)
        recomputed = functools.partial(remat.unit, self.config.remat)

        def transform(block: Any, h: jax.Array, states: jax.Array, keys: Mask, rope: Any, inner: Taps) -> jax.Array:
            return inner.within(recomputed, block, h, states, keys, rope)

        def second(block: Any, h: jax.Array, embedding: jax.Array, inner: Taps) -> jax.Array:
            return block(h, embedding, inner, "second_residual")

        h = run_standing((self.mid_residual, self.mid_more_residuals), "residual_block", tap, h, embedding)
        transformers = self.mid_transformer, self.mid_more_transformers
        h = run_standing(transformers, "transformer", tap, h, states, keys, rope, call=transform)
        seconds = self.mid_residual_2, self.mid_more_residuals_2
        h = run_standing(seconds, "second_residual_block", tap, h, embedding, call=second)
        return shard(h, "image")


def _rope(config: UNetConfig, stage: int, h: jax.Array) -> Rope | None:
    if not (config.rope and config.self_attention[stage]):
        return None
    return rope_table(h.shape[1], h.shape[2], config.head_dim, config.rope_theta)


def _check_inputs(config: UNetConfig, x: jax.Array, time: jax.Array, context: TextContext) -> None:
    _, h, w, c = x.shape
    if c != config.latent_channels:
        raise ValueError(f"UNet: the latent has {c} channels, but latent_channels={config.latent_channels}")
    if h % config.reduction or w % config.reduction:
        raise ValueError(
            f"UNet: a latent of {h} x {w} does not divide by {config.reduction}, as {len(config.channels)} stages "
            f"need; change the image size or the number of stages"
        )
    if time.shape[-1] != config.time_width:
        raise ValueError(f"UNet: {time.shape[-1]} time features given, but time_width={config.time_width}")
    if context.sequence.shape[-1] != config.context_width:
        raise ValueError(
            f"UNet: the text states are {context.sequence.shape[-1]} wide, but context_width={config.context_width}"
        )
    if config.pooled_width and context.pooled.shape[-1] != config.pooled_width:
        raise ValueError(
            f"UNet: the pooled text is {context.pooled.shape[-1]} wide, but pooled_width={config.pooled_width}"
        )
