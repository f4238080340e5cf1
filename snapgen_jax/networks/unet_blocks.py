"""The parts of the SnapGen UNet: residual block, transformer, the unit of both, and the samplers between stages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from snapgen_jax.networks import remat
from snapgen_jax.networks.attention import Attention, rope_table
from snapgen_jax.networks.attention_kernels import Mask
from snapgen_jax.networks.attention_table import kernel_of
from snapgen_jax.networks.depthwise import DepthwiseConv
from snapgen_jax.networks.fused_separable import Norm, fused
from snapgen_jax.networks.layers import GEGLU, PRODUCT, Conv, GroupNorm, Init, LayerNorm, Linear, upsample_nearest
from snapgen_jax.networks.module import compute_dtype, shard
from snapgen_jax.networks.taps import NO_TAPS, Taps
from snapgen_jax.networks.unet_config import UNetArchitecture, copy_name

Rope = tuple[np.ndarray, np.ndarray]


class SeparableConv(nnx.Module):
    """Depthwise 3x3 with a bias, then pointwise without one."""

    def __init__(
        self,
        config: UNetArchitecture,
        in_width: int,
        out_width: int,
        *,
        stride: int = 1,
        init: Init = "fan_in",
        rngs: nnx.Rngs,
    ):
        dtype = compute_dtype(config)
        self.depthwise = DepthwiseConv(in_width, stride=stride, form=config.depthwise, dtype=dtype, rngs=rngs)
        self.pointwise = Conv(in_width, out_width, 1, bias=False, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.pointwise(self.depthwise(x))

    def fused(self, norm: GroupNorm, x: jax.Array, offset: jax.Array | None, interpret: bool = False) -> jax.Array:
        """This convolution of `silu(norm(x))`, plus an offset `[B, O]` of all pixels, as one kernel for TPUs."""
        depthwise, weights = self.depthwise, self.pointwise.kernel[...]
        coefficients = Norm(*norm.coefficients(x))
        offset = jnp.zeros((x.shape[0], weights.shape[-1])) if offset is None else offset
        return fused(x, coefficients, depthwise.kernel[...], depthwise.bias[...], weights, offset, interpret)


def _conv(
    config: UNetArchitecture,
    separable: bool,
    in_width: int,
    out_width: int,
    rngs: nnx.Rngs,
    stride: int = 1,
    init: Init = "fan_in",
) -> SeparableConv | Conv:
    if separable:
        return SeparableConv(config, in_width, out_width, stride=stride, init=init, rngs=rngs)
    return Conv(in_width, out_width, stride=stride, init=init, dtype=compute_dtype(config), rngs=rngs)


class ResidualBlock(nnx.Module):
    """Two normalised 3x3 convolutions around the addition of the time embedding; the second one starts at zero.

    SnapGen, section 3.1: the convolutions are separable and the width between them is expanded.
    """

    def __init__(self, config: UNetArchitecture, in_width: int, out_width: int, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        base = {"out": out_width, "in": in_width, "max": max(in_width, out_width)}[config.expand_base]
        middle = base * config.expand_ratio
        separable = config.convolution == "separable"
        self.norm_1 = GroupNorm(in_width, config.groups, dtype=dtype)
        self.conv_1 = _conv(config, separable, in_width, middle, rngs)
        self.embedding = Linear(config.embedding_width, middle, dtype=dtype, rngs=rngs)
        self.norm_2 = GroupNorm(middle, config.groups, dtype=dtype)
        self.conv_2 = _conv(config, separable, middle, out_width, rngs, init="zeros")
        self.skip = Conv(in_width, out_width, 1, dtype=dtype, rngs=rngs) if in_width != out_width else None
        self.remat: remat.Remat = config.remat
        self.fuses = config.separable_block == "fused"

    def __call__(self, x: jax.Array, embedding: jax.Array, tap: Taps = NO_TAPS, name: str = "residual") -> jax.Array:
        """`[B, H, W, in] -> [B, H, W, out]`; `embedding` is `[B, E]`, already activated. What the convolutions add is
        the intermediate called `name`."""

        def block(x: jax.Array, embedding: jax.Array, tap: Taps) -> jax.Array:
            def convolutions(x: jax.Array) -> jax.Array:
                h = self._half(self.norm_1, self.conv_1, x, lambda: self.embedding(embedding))
                return self._half(self.norm_2, self.conv_2, h)

            h = tap.entered(name, convolutions, x, x.dtype)
            return h + (x if self.skip is None else self.skip(x))

        return tap.within(functools.partial(remat.block, self.remat), block, x, embedding)

    def _half(
        self,
        norm: GroupNorm,
        conv: SeparableConv | Conv,
        x: jax.Array,
        offset: Callable[[], jax.Array] | None = None,
    ) -> jax.Array:
        """Norm, SiLU and convolution, and an offset `[B, O]` of all pixels."""

        def composed(x: jax.Array) -> jax.Array:
            h = conv(jax.nn.silu(norm(x)))
            return h if offset is None else h + offset()[:, None, None, :]

        if not self.fuses or not isinstance(conv, SeparableConv):
            return composed(x)

        def fused(x: jax.Array) -> jax.Array:
            return conv.fused(norm, x.astype(conv.pointwise.dtype), None if offset is None else offset())

        return checkpoint_name(jax.lax.platform_dependent(x, tpu=fused, default=composed), PRODUCT)


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention and a gated feed-forward network, each with a LayerNorm before and a residual."""

    def __init__(
        self, config: UNetArchitecture, width: int, self_attention: bool, cross_attention: bool, rngs: nnx.Rngs
    ):
        dtype = compute_dtype(config)

        def attention(context_width: int | None = None) -> Attention:
            return Attention(
                width,
                width // config.head_dim,
                config.head_dim,
                context_width=context_width,
                kv_heads=config.kv_heads,
                qk_norm=config.qk_norm,
                kernel=kernel_of(config),
                chunk=config.attention_chunk,
                dtype=dtype,
                rngs=rngs,
            )

        self.self_norm = LayerNorm(width, dtype=dtype) if self_attention else None
        self.self_attention = attention() if self_attention else None
        self.cross_norm = LayerNorm(width, dtype=dtype) if cross_attention else None
        self.cross_attention = attention(config.context_width) if cross_attention else None
        self.ffn_norm = LayerNorm(width, dtype=dtype)
        self.ffn = GEGLU(width, config.ffn_ratio * width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: jax.Array, keys: Mask, rope: Rope | None, tap: Taps = NO_TAPS
    ) -> jax.Array:
        if (attend := self.self_attention) is not None and self.self_norm is not None:
            x = x + tap.entered("self_attention", lambda z: attend(z, rope=rope), self.self_norm(x), x.dtype)
        if (cross := self.cross_attention) is not None and self.cross_norm is not None:
            x = x + tap.entered("cross_attention", lambda z: cross(z, context, mask=keys), self.cross_norm(x), x.dtype)
        return x + tap.entered("ffn", self.ffn, self.ffn_norm(x), x.dtype)


class Transformer(nnx.Module):
    """`depth` transformer blocks over the pixels of an image, inside a residual that starts at zero."""

    def __init__(self, config: UNetArchitecture, stage: int, depth: int, rngs: nnx.Rngs):
        width, dtype = config.channels[stage], compute_dtype(config)
        flags = config.self_attention[stage], config.cross_attention[stage]
        self.norm = GroupNorm(width, config.groups, dtype=dtype)
        self.project_in = Linear(width, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([TransformerBlock(config, width, *flags, rngs) for _ in range(depth)])
        self.project_out = Linear(width, width, init="zeros", dtype=dtype, rngs=rngs)
        self.absolute = config.absolute_positions
        self.remat: remat.Remat = config.remat

    def __call__(
        self, x: jax.Array, context: jax.Array, keys: Mask, rope: Rope | None, tap: Taps = NO_TAPS
    ) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`; context `[B, L, D]`, `keys` says which of its L states count."""
        b, h, w, c = x.shape
        tokens = remat.block(self.remat, lambda x: self.project_in(self.norm(x).reshape(b, h * w, c)))(x)
        if self.absolute:
            # Added to the image: a table of rank 3 added to rows of rank 2, which converters make of a sum of tokens,
            # is read as N images of one cell by mobile GPU delegates, and the result is wrong without an error.
            table = np.concatenate(rope_table(h, w, c, theta=100.0), axis=-1).astype(tokens.dtype)
            tokens = (tokens.reshape(b, h, w, c) + table.reshape(h, w, c)).reshape(b, h * w, c)
        tokens = shard(tokens, "tokens")
        recomputed = functools.partial(remat.block, self.remat)
        for i, block in enumerate(self.blocks):
            tokens = tap.block(f"block_{i}", block, tokens, context, keys, rope, remat=recomputed)
        return x + self.project_out(tokens).reshape(b, h, w, c)


def standing(count: int, make: Callable[[bool], nnx.Module]) -> tuple[Any, nnx.List | None]:
    """The blocks that stand in one place: the first, which keeps the place's name among the parameters, and the rest.

    `make(first)` draws one; None stands for none.
    """
    first = make(True) if count else None
    return first, nnx.List([make(False) for _ in range(count - 1)]) if count > 1 else None


def run_standing(
    blocks: tuple[Any, nnx.List | None],
    name: str,
    tap: Taps,
    x: jax.Array,
    *args: Any,
    call: Callable[..., jax.Array] = lambda block, x, *args: block(x, *args),
) -> jax.Array:
    """Runs the blocks of `standing` one after another, each unless it is replaced by its name.

    Args:
        blocks: of `standing`.
        name: of the first in `tap`; what is inside that one has names of its own, unless it is replaced.
        tap: of the unit.
        x, args: what the blocks take.
        call: `(block, x, *args, tap)`, how one is called.
    """
    first, rest = blocks
    for i, block in enumerate([] if first is None else [first, *(rest or ())]):
        own = copy_name(name, i)
        inner = NO_TAPS if i or tap.touches(own) else tap
        x = tap.module(own, functools.partial(_called, call, block, inner), x, *args)
    return x


def _called(call: Callable[..., jax.Array], block: Any, tap: Taps, x: jax.Array, *args: Any) -> jax.Array:
    return call(block, x, *args, tap)


class Unit(nnx.Module):
    """A residual block, a transformer, or the one and then the other; each as often as `config.blocks` says."""

    def __init__(
        self,
        config: UNetArchitecture,
        name: str,
        stage: int,
        in_width: int,
        depth: int,
        residual: bool,
        rngs: nnx.Rngs,
    ):
        out_width = config.channels[stage]

        def residual_block(first: bool) -> nnx.Module:
            return ResidualBlock(config, in_width if first else out_width, out_width, rngs)

        def transformer(first: bool) -> nnx.Module:
            return Transformer(config, stage, depth, rngs)

        residuals = config.count(f"{name}_residual_block") if residual else 0
        transformers = config.count(f"{name}_transformer") if depth else 0
        self.residual, self.more_residuals = standing(residuals, residual_block)
        self.transformer, self.more_transformers = standing(transformers, transformer)

    def __call__(
        self,
        x: jax.Array,
        embedding: jax.Array,
        context: jax.Array,
        keys: Mask,
        rope: Rope | None,
        tap: Taps = NO_TAPS,
    ) -> jax.Array:
        x = run_standing((self.residual, self.more_residuals), "residual_block", tap, x, embedding)
        transformers = self.transformer, self.more_transformers
        x = run_standing(transformers, "transformer", tap, x, context, keys, rope)
        return shard(x, "image")


class Downsample(nnx.Module):
    """3x3 convolution of stride 2: `[B, H, W, C] -> [B, H/2, W/2, C]`."""

    def __init__(self, config: UNetArchitecture, width: int, rngs: nnx.Rngs):
        self.conv = _conv(config, config.sampler == "sep", width, width, rngs, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: `[B, H, W, C] -> [B, 2H, 2W, C]`."""

    def __init__(self, config: UNetArchitecture, width: int, rngs: nnx.Rngs):
        self.conv = _conv(config, config.sampler == "sep", width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(upsample_nearest(x))


class EmbeddingMLP(nnx.Module):
    """`[B, in] -> [B, out]`: linear to `width`, SiLU, linear; `out_width` is `width` where none is given."""

    def __init__(self, in_width: int, width: int, *, out_width: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.inner = Linear(in_width, width, dtype=dtype, rngs=rngs)
        self.outer = Linear(width, width if out_width is None else out_width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(jax.nn.silu(self.inner(x)))
