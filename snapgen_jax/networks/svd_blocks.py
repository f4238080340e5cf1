"""The parts of Stable Video Diffusion's networks that see several frames (Blattmann et al. 2023, arXiv 2311.15127).

A spatial block runs on each frame, a temporal one mixes the frames of each pixel, and a learned factor blends both
results. Frames are folded into the batch, `[B * F, H, W, C]`, so that no activation has five axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from snapgen_jax.networks.layers import GEGLU, GroupNorm, LayerNorm, Linear
from snapgen_jax.networks.module import compute_dtype, draw, shard
from snapgen_jax.networks.sd_blocks import (
    TRANSFORMER_EPSILON,
    BlockConfig,
    Conditions,
    MultiHeadAttention,
    ResidualBlock,
    TransformerBlock,
)
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet_blocks import EmbeddingMLP

FRAME_KERNEL = 3


class TemporalConv(nnx.Module):
    """Convolution over three neighbouring frames of each pixel: `[B * F, H, W, in] -> [B * F, H, W, out]`."""

    def __init__(self, in_width: int, out_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = draw(rngs, nnx.initializers.lecun_normal(), (FRAME_KERNEL, 1, 1, in_width, out_width))
        self.bias = nnx.Param(jnp.zeros(out_width))
        self.dtype = dtype

    def __call__(self, x: jax.Array, frames: int) -> jax.Array:
        _, h, w, c = x.shape
        rows = x.astype(self.dtype).reshape(-1, frames, h * w, c)
        y = jax.lax.conv_general_dilated(
            rows,
            self.kernel[...][:, :, 0].astype(self.dtype),
            window_strides=(1, 1),
            padding=[(FRAME_KERNEL // 2, FRAME_KERNEL // 2), (0, 0)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return (y + self.bias[...].astype(self.dtype)).reshape(-1, h, w, y.shape[-1])


class ClipNorm(GroupNorm):
    """Group normalisation whose statistics are those of a whole clip."""

    def over(self, x: jax.Array, frames: int) -> jax.Array:
        """`[B * F, H, W, C]`, normalised over F, H, W and the channels of a group."""
        _, h, w, c = x.shape
        return self(x.reshape(-1, frames * h, w, c)).reshape(x.shape)


class TemporalResidualBlock(nnx.Module):
    """A residual block over the frames of each pixel; `embedding_width` of None for one that is told no time."""

    def __init__(
        self,
        width: int,
        embedding_width: int | None,
        *,
        groups: int,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm_1 = ClipNorm(width, groups, epsilon=epsilon, dtype=dtype)
        self.conv_1 = TemporalConv(width, width, dtype=dtype, rngs=rngs)
        self.embedding = None if embedding_width is None else Linear(embedding_width, width, dtype=dtype, rngs=rngs)
        self.norm_2 = ClipNorm(width, groups, epsilon=epsilon, dtype=dtype)
        self.conv_2 = TemporalConv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, frames: int, embedding: jax.Array | None = None) -> jax.Array:
        """`[B * F, H, W, C] -> [B * F, H, W, C]`."""
        h = self.conv_1(jax.nn.silu(self.norm_1.over(x, frames)), frames)
        if self.embedding is not None and embedding is not None:
            h = h + self.embedding(embedding)[:, None, None, :]
        return x + self.conv_2(jax.nn.silu(self.norm_2.over(h, frames)), frames)


class Blend(nnx.Module):
    """`a x + (1 - a) y` with a the logistic function of a learned number."""

    def __init__(self, initial: float = 0.5):
        self.factor = nnx.Param(jnp.full((1,), initial, jnp.float32))

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        a = jax.nn.sigmoid(self.factor[...]).astype(x.dtype)
        return a * x + (1 - a) * y


class SpaceTimeResidualBlock(nnx.Module):
    """A residual block on each frame, and one over the frames of its result."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        embedding_width: int,
        *,
        groups: int,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.spatial = ResidualBlock(
            in_width, out_width, embedding_width, groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs
        )
        self.temporal = TemporalResidualBlock(
            out_width, embedding_width, groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs
        )
        self.blend = Blend()

    def __call__(self, x: jax.Array, conditions: Conditions) -> jax.Array:
        """`[B * F, H, W, in] -> [B * F, H, W, out]`."""
        x = self.spatial(x, conditions)
        return shard(self.blend(x, self.temporal(x, conditions.frames, conditions.embedding)), "image")


class TemporalTransformerBlock(nnx.Module):
    """Feed-forward network, attention among the frames of a pixel, cross-attention and feed-forward network."""

    def __init__(self, config: BlockConfig, width: int, heads: int, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.norm_in = LayerNorm(width, dtype=dtype)
        self.ffn_in = GEGLU(width, 4 * width, exact=config.exact_gelu, dtype=dtype, rngs=rngs)
        self.self_norm = LayerNorm(width, dtype=dtype)
        self.self_attention = MultiHeadAttention(config, width, heads, width, rngs)
        self.cross_norm = LayerNorm(width, dtype=dtype)
        self.cross_attention = MultiHeadAttention(config, width, heads, config.context_width, rngs)
        self.ffn_norm = LayerNorm(width, dtype=dtype)
        self.ffn = GEGLU(width, 4 * width, exact=config.exact_gelu, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, conditions: Conditions) -> jax.Array:
        """`[B * F, L, width] -> [B * F, L, width]`. All frames of a clip attend to the context of its first one."""
        rows, length, width = tokens.shape
        frames, states = conditions.frames, conditions.states[:: conditions.frames]
        clips = rows // frames
        x = tokens.reshape(clips, frames, length, width).swapaxes(1, 2).reshape(clips * length, frames, width)
        x = x + self.ffn_in(self.norm_in(x))
        x = x + self.self_attention(self.self_norm(x))
        # Every pixel of a clip asks the same context: as one row of queries, whose keys are made once.
        queries = self.cross_norm(x).reshape(clips, length * frames, width)
        x = x + self.cross_attention(queries, states).reshape(x.shape)
        x = x + self.ffn(self.ffn_norm(x))
        return x.reshape(clips, length, frames, width).swapaxes(1, 2).reshape(tokens.shape)


class SpaceTimeTransformer(nnx.Module):
    """Transformer blocks over the pixels of each frame, each followed by one over the frames of each pixel."""

    def __init__(self, config: BlockConfig, width: int, heads: int, depth: int, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.norm = GroupNorm(width, config.groups, epsilon=TRANSFORMER_EPSILON, dtype=dtype)
        self.project_in = Linear(width, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([TransformerBlock(config, width, heads, rngs) for _ in range(depth)])
        self.temporal_blocks = nnx.List([TemporalTransformerBlock(config, width, heads, rngs) for _ in range(depth)])
        self.frame_position = EmbeddingMLP(width, 4 * width, out_width=width, dtype=dtype, rngs=rngs)
        self.blend = Blend()
        self.project_out = Linear(width, width, init="zeros", dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, conditions: Conditions) -> jax.Array:
        """`[B * F, H, W, C] -> [B * F, H, W, C]`."""
        rows, h, w, c = x.shape
        frames = conditions.frames
        tokens = shard(self.project_in(self.norm(x).reshape(rows, h * w, c)), "tokens")
        position = self.frame_position(time_features(jnp.arange(frames), c, 1.0))
        position = jnp.tile(position, (rows // frames, 1))[:, None]
        for block, temporal in zip(self.blocks, self.temporal_blocks, strict=True):
            tokens = block(tokens, conditions.states, conditions.mask)
            tokens = self.blend(tokens, temporal(tokens + position, conditions))
        return shard(x + self.project_out(tokens).reshape(rows, h, w, c), "image")
