"""Gemma 2 as a text encoder (Gemma Team 2024, arXiv 2408.00118): the language model without its output head.

Causal, so that a state knows its own token and those before it. Every other layer, from the first on, sees only a
sliding window. Scores are soft-capped, and each half of a layer is normalised before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from snapgen_jax.networks.attention import rotate
from snapgen_jax.networks.attention_kernels import MASKED, attend, causal_bias, mask_bias
from snapgen_jax.networks.depth import scan, stack
from snapgen_jax.networks.layers import Linear
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, draw, shard, take_apart
from snapgen_jax.networks.text import TextContext

# Kernels are split along their output, which a checkpoint stores as whole rows: each host reads one run of bytes. What
# leads back to the stream of tokens is split along its input too, among `tensor` (Shoeybi et al. 2019, section 3).
_SPLIT = ("tensor", "fsdp")
_RULES: Rules = [
    (r"token_embedding$", PartitionSpec(_SPLIT, None)),
    (r"blocks/.*(out|outer)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/.*kernel$", PartitionSpec(None, None, _SPLIT)),
]


@dataclasses.dataclass(frozen=True)
class Gemma2Config(Preset):
    """Architecture of a `Gemma2`. The defaults are those of Gemma-2-2b, 2.61e9 parameters.

    Attributes:
        vocab_size: rows of the token table.
        width, layers, heads, kv_heads, head_dim: of the transformer; `heads / kv_heads` query heads share a key head.
        ffn_width: hidden width of the gated feed-forward network.
        query_scale: scores are divided by the square root of this; None for `head_dim`.
        softcap: bound of the attention scores.
        window: a token in a layer with a sliding window sees itself and the `window - 1` tokens before it.
        rope_theta: base of the rotary positions.
        epsilon: of the norms.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["gemma2"] = "gemma2"
    vocab_size: int = 256_000
    width: int = 2304
    layers: int = 26
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    ffn_width: int = 9216
    query_scale: float | None = None
    softcap: float = 50.0
    window: int = 4096
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"Gemma2Config: kv_heads={self.kv_heads} does not divide heads={self.heads}; change one")

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the encoder with freshly drawn parameters."""
        return Gemma2(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, tokens: int = 256) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`ShapeDtypeStruct`s of a `Gemma2`'s positional arguments, tokens and mask."""
        return jax.ShapeDtypeStruct((batch, tokens), jnp.int32), jax.ShapeDtypeStruct((batch, tokens), jnp.float32)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "vocab_size": 64,
            "width": 16,
            "layers": 3,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "ffn_width": 24,
            "query_scale": 12.0,
            "softcap": 2.0,
            "window": 5,
        },
        "gemma2_2b": {},
    }


def rope_table(length: int, dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of rotary positions 0, 1 ..., each `[L, dim / 2]` float32 (Su et al. 2021, equation 15)."""
    angles = np.arange(length)[:, None] * theta ** -(np.arange(0, dim, 2) / dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def window_bias(length: int, window: int) -> jax.Array:
    """`[1, 1, L, L]` float32 to add to attention scores, so that a token sees `window` tokens up to itself."""
    too_early = np.tril(np.ones((length, length), np.float32), k=-window)
    return causal_bias(length) + jnp.asarray(too_early * MASKED)[None, None]


class OffsetRMSNorm(nnx.Module):
    """RMSNorm whose gain is stored as its difference from one, which bfloat16 holds more exactly than the gain."""

    def __init__(self, width: int, *, epsilon: float, dtype: DTypeLike):
        self.offset = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        return (y * (1.0 + self.offset[...].astype(jnp.float32))).astype(self.dtype)


class Gemma2Layer(nnx.Module):
    """Self-attention and a gated feed-forward network, each between two norms and with a residual around them."""

    def __init__(self, config: Gemma2Config, rngs: nnx.Rngs):
        dtype = compute_dtype(config)

        def linear(in_width: int, out_width: int) -> Linear:
            return Linear(in_width, out_width, bias=False, dtype=dtype, rngs=rngs)

        def norm() -> OffsetRMSNorm:
            return OffsetRMSNorm(config.width, epsilon=config.epsilon, dtype=dtype)

        self.norm_1, self.norm_1_after = norm(), norm()
        self.query = linear(config.width, config.heads * config.head_dim)
        self.key = linear(config.width, config.kv_heads * config.head_dim)
        self.value = linear(config.width, config.kv_heads * config.head_dim)
        self.out = linear(config.heads * config.head_dim, config.width)
        self.norm_2, self.norm_2_after = norm(), norm()
        self.gate = linear(config.width, config.ffn_width)
        self.inner = linear(config.width, config.ffn_width)
        self.outer = linear(config.ffn_width, config.width)
        self.head_dim, self.softcap = config.head_dim, config.softcap
        self.scale = (config.head_dim if config.query_scale is None else config.query_scale) ** -0.5

    def __call__(self, x: jax.Array, bias: jax.Array, rope: tuple[np.ndarray, np.ndarray]) -> jax.Array:
        b, length, _ = x.shape
        h = self.norm_1(x)
        q, k, v = (part(h).reshape(b, length, -1, self.head_dim) for part in (self.query, self.key, self.value))
        y = attend(rotate(q, rope), rotate(k, rope), v, bias, scale=self.scale, softcap=self.softcap)
        x = x + self.norm_1_after(self.out(y.reshape(b, length, -1)))
        h = self.norm_2(x)
        h = self.outer(jax.nn.gelu(self.gate(h), approximate=True) * self.inner(h))
        return shard(x + self.norm_2_after(h))


class Gemma2(nnx.Module):
    """Token ids to a `TextContext`. Build it through `networks.module.build`."""

    def __init__(self, config: Gemma2Config, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = draw(rngs, nnx.initializers.normal(0.02), (config.vocab_size, config.width))
        self.blocks = stack(lambda rngs: Gemma2Layer(config, rngs), config.layers, rngs)
        self.norm = OffsetRMSNorm(config.width, epsilon=config.epsilon, dtype=compute_dtype(config))

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> TextContext:
        """Encodes a text.

        Args:
            tokens: `[B, L]` int32, padded on the right.
            mask: `[B, L]` float32, 1 for tokens and 0 for padding; None where there is no padding.

        Returns:
            sequence `[B, L, width]`, mask `[B, L]` (ones where none was given) and pooled `[B, width]`: the state of
            the last token, which is the only one that knows the whole text; float32.
        """
        states, _ = self.states(tokens, mask)
        mask = jnp.ones(tokens.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
        last = jnp.maximum(mask.sum(axis=-1).astype(jnp.int32) - 1, 0)
        return TextContext(states, mask, jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0])

    def states(
        self, tokens: jax.Array, mask: jax.Array | None = None, *, taps: Sequence[int] = ()
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Last states `[B, L, width]` after the final norm, and those after each layer in `taps` before any norm."""
        x, rope, full, sliding = self._embed(tokens), *self._positions(tokens.shape[1], mask)

        def body(layer: Gemma2Layer, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, index = carry
            return layer(x, jnp.where(index % 2 == 0, sliding, full), rope), index + 1

        carry = (shard(x), jnp.int32(0))
        (x, _), found = scan(body, self.blocks, carry, taps=taps, feature=lambda carry: carry[0])
        return self.norm(x).astype(jnp.float32), found

    def part(self, tokens: jax.Array, mask: jax.Array, x: jax.Array | None, first: int, last: int) -> Any:
        """Runs the layers `first` up to `last`, one after the other and without a loop in the program, for an encoder
        that is exported. `blocks` holds these layers alone.

        Args:
            tokens, mask: of the text, as for the whole encoder; `tokens` are read where `first` is 0.
            x: states `[B, L, width]` before layer `first`; None where that is 0.
            first, last: of all the layers.

        Returns:
            The states before layer `last`; where that is the number of layers a `TextContext` of the last states, whose
            pooled vector is empty.
        """
        states = self._embed(tokens) if x is None else x
        rope, full, sliding = self._positions(states.shape[1], mask)
        join, stacked = take_apart(self.blocks)
        for i in range(first, last):
            layer: Any = join(jax.tree.map(lambda p, i=i: p[i - first], stacked))
            states = layer(states, full if i % 2 else sliding, rope)
        if last < self.config.layers:
            return states
        return TextContext(self.norm(states).astype(jnp.float32), mask.astype(jnp.float32), states[:, 0, :0])

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # The residual stream is float32: it grows into the thousands, where bfloat16 has steps of eight.
        x = self.token_embedding[...].at[tokens].get(mode="clip")
        return x.astype(jnp.float32) * self.config.width**0.5

    def _positions(self, length: int, mask: jax.Array | None) -> tuple[Any, jax.Array, jax.Array]:
        """Rotary positions, and the biases of the layers that see all and of those with a sliding window."""
        config, padding = self.config, 0.0 if mask is None else mask_bias(mask)
        rope = rope_table(length, config.head_dim, config.rope_theta)
        return rope, causal_bias(length) + padding, window_bias(length, config.window) + padding
