"""The parts of Stable Diffusion's UNets: residual block, transformer, and the samplers between stages."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from snapgen_jax.networks.attention_kernels import Mask, attend_by
from snapgen_jax.networks.attention_table import AttentionChoice, AttentionKernel, kernel_of
from snapgen_jax.networks.layers import GEGLU, Conv, GroupNorm, LayerNorm, Linear, upsample_nearest
from snapgen_jax.networks.module import compute_dtype, shard

TRANSFORMER_EPSILON = 1e-6


class BlockConfig(Protocol):
    """What the blocks read of a network's config."""

    @property
    def groups(self) -> int: ...
    @property
    def embedding_width(self) -> int: ...
    @property
    def context_width(self) -> int: ...
    @property
    def projection(self) -> Literal["conv", "linear"]: ...
    @property
    def exact_gelu(self) -> bool: ...
    @property
    def attention(self) -> AttentionChoice: ...
    @property
    def attention_chunk(self) -> int: ...
    @property
    def dtype(self) -> str: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """What every block of a call is told.

    Attributes:
        embedding: `[B, E]` of the time and what is pooled, activated.
        states: `[B, L, D]` text states.
        mask: of the text states, for cross-attention; None where all text is attended to.
        frames: of a clip, which are folded into the batch: B is clips times frames.
    """

    embedding: jax.Array
    states: jax.Array
    mask: Mask | None = None
    frames: int = dataclasses.field(default=1, metadata={"static": True})


class ResidualBlock(nnx.Module):
    """Two normalised 3x3 convolutions around the addition of the embedding (Dhariwal and Nichol 2021, section 3)."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        embedding_width: int,
        *,
        groups: int,
        epsilon: float = 1e-5,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm_1 = GroupNorm(in_width, groups, epsilon=epsilon, dtype=dtype)
        self.conv_1 = Conv(in_width, out_width, dtype=dtype, rngs=rngs)
        self.embedding = Linear(embedding_width, out_width, dtype=dtype, rngs=rngs)
        self.norm_2 = GroupNorm(out_width, groups, epsilon=epsilon, dtype=dtype)
        self.conv_2 = Conv(out_width, out_width, init="zeros", dtype=dtype, rngs=rngs)
        self.skip = Conv(in_width, out_width, 1, dtype=dtype, rngs=rngs) if in_width != out_width else None

    def __call__(self, x: jax.Array, conditions: Conditions) -> jax.Array:
        """`[B, H, W, in] -> [B, H, W, out]`."""
        h = self.conv_1(jax.nn.silu(self.norm_1(x)))
        h = h + self.embedding(conditions.embedding)[:, None, None, :]
        h = self.conv_2(jax.nn.silu(self.norm_2(h)))
        return shard(h + (x if self.skip is None else self.skip(x)), "image")


class MultiHeadAttention(nnx.Module):
    """Multi-head attention without biases but that of the output, by the kernel that a config names."""

    def __init__(self, config: BlockConfig, width: int, heads: int, context_width: int, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"attention: {heads} heads do not divide {width} channels; change `heads` or the widths")
        dtype = compute_dtype(config)
        self.query = Linear(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.key = Linear(context_width, width, bias=False, dtype=dtype, rngs=rngs)
        self.value = Linear(context_width, width, bias=False, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.kernel: AttentionKernel = kernel_of(config)
        self.heads, self.chunk = heads, config.attention_chunk

    def __call__(self, x: jax.Array, context: jax.Array | None = None, mask: Mask | None = None) -> jax.Array:
        """`[B, L, width]` to a context `[B, M, context_width]`, or to itself where none is given."""
        source = x if context is None else context
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.query(x), self.key(source), self.value(source))
        )
        y = attend_by(self.kernel, q, k, v, mask, chunk=self.chunk)
        return self.out(y.reshape(x.shape))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention and a gated feed-forward network, each with a LayerNorm before and a residual."""

    def __init__(self, config: BlockConfig, width: int, heads: int, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.self_norm = LayerNorm(width, dtype=dtype)
        self.self_attention = MultiHeadAttention(config, width, heads, width, rngs)
        self.cross_norm = LayerNorm(width, dtype=dtype)
        self.cross_attention = MultiHeadAttention(config, width, heads, config.context_width, rngs)
        self.ffn_norm = LayerNorm(width, dtype=dtype)
        self.ffn = GEGLU(width, 4 * width, exact=config.exact_gelu, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, states: jax.Array, mask: Mask | None) -> jax.Array:
        """`[B, L, width] -> [B, L, width]`."""
        x = x + self.self_attention(self.self_norm(x))
        x = x + self.cross_attention(self.cross_norm(x), states, mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nnx.Module):
    """`depth` transformer blocks over the pixels of an image, inside a residual (Rombach et al. 2022, appendix E.2.1).

    Its projections are 1x1 convolutions in Stable Diffusion 1 and linear layers after it: the same function, stored
    otherwise.
    """

    def __init__(self, config: BlockConfig, width: int, heads: int, depth: int, rngs: nnx.Rngs):
        dtype = compute_dtype(config)

        def projection(init: Literal["fan_in", "zeros"]) -> Conv | Linear:
            if config.projection == "conv":
                return Conv(width, width, 1, init=init, dtype=dtype, rngs=rngs)
            return Linear(width, width, init=init, dtype=dtype, rngs=rngs)

        self.norm = GroupNorm(width, config.groups, epsilon=TRANSFORMER_EPSILON, dtype=dtype)
        self.project_in = projection("fan_in")
        self.blocks = nnx.List([TransformerBlock(config, width, heads, rngs) for _ in range(depth)])
        self.project_out = projection("zeros")

    def __call__(self, x: jax.Array, conditions: Conditions) -> jax.Array:
        """`[B, H, W, C] -> [B, H, W, C]`."""
        b, h, w, c = x.shape
        tokens = shard(self.project_in(self.norm(x)).reshape(b, h * w, c), "tokens")
        for block in self.blocks:
            tokens = block(tokens, conditions.states, conditions.mask)
        return shard(x + self.project_out(tokens.reshape(b, h, w, c)), "image")


class Downsample(nnx.Module):
    """3x3 convolution of stride 2: `[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C]`."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(width, width, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: `[B, H, W, C] -> [B, 2H, 2W, C]`."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(upsample_nearest(x))
