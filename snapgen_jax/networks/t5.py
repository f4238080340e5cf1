"""The encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683; gated feed-forward network of Shazeer 2020).

Tokens attend to each other in both directions. Positions enter only through a bias of the attention scores, one number
a head for each bucket of distances, shared by all layers. There is no bias elsewhere, and the scores are not scaled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.attention_kernels import attend, mask_bias
from snapgen_jax.networks.depth import scan, stack
from snapgen_jax.networks.layers import Linear, RMSNorm
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, draw, shard
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
class T5Config(Preset):
    """Architecture of a `T5Encoder`. The defaults are those of T5-XXL v1.1, 4.76e9 parameters.

    Attributes:
        vocab_size: rows of the token table.
        width, layers, heads, head_dim: of the transformer; `heads * head_dim` may differ from `width`.
        ffn_width: hidden width of the gated feed-forward network.
        buckets: number of distance buckets, half of them for each direction.
        max_distance: distances from here on share the last bucket.
        epsilon: of the norms.
        dtype: platform choice, fixed by `module.for_platform`. float16 is not offered: the largest T5 overflows in it.
    """

    kind: Literal["t5"] = "t5"
    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    ffn_width: int = 10240
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the encoder with freshly drawn parameters."""
        return T5Encoder(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, tokens: int = 256) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`ShapeDtypeStruct`s of a `T5Encoder`'s positional arguments, tokens and mask."""
        return jax.ShapeDtypeStruct((batch, tokens), jnp.int32), jax.ShapeDtypeStruct((batch, tokens), jnp.float32)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "vocab_size": 64,
            "width": 16,
            "layers": 3,
            "heads": 3,
            "head_dim": 8,
            "ffn_width": 24,
            "buckets": 8,
            "max_distance": 16,
        },
        "xxl": {},
    }


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket `[L, L]` int32 of the distance from query (row) to key (column); section 2.1 of the paper.

    Half of the buckets are for keys after the query. In each half, half of the buckets hold one distance each, and the
    others grow logarithmically up to `max_distance`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    # float32, as in the reference: the borders between buckets are where rounding decides.
    ratio = np.log(np.maximum(np.abs(distance), exact).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(far, half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


class T5Layer(nnx.Module):
    """Self-attention and a gated feed-forward network, each with an RMSNorm before and a residual."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        dtype, inner = compute_dtype(config), config.heads * config.head_dim

        def linear(in_width: int, out_width: int) -> Linear:
            return Linear(in_width, out_width, bias=False, dtype=dtype, rngs=rngs)

        self.norm_1 = RMSNorm(config.width, epsilon=config.epsilon, dtype=dtype)
        self.query = linear(config.width, inner)
        self.key = linear(config.width, inner)
        self.value = linear(config.width, inner)
        self.out = linear(inner, config.width)
        self.norm_2 = RMSNorm(config.width, epsilon=config.epsilon, dtype=dtype)
        self.gate = linear(config.width, config.ffn_width)
        self.inner = linear(config.width, config.ffn_width)
        self.outer = linear(config.ffn_width, config.width)
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        b, length, _ = x.shape
        h = self.norm_1(x)
        q, k, v = (part(h).reshape(b, length, -1, self.head_dim) for part in (self.query, self.key, self.value))
        x = x + self.out(attend(q, k, v, bias, scale=1.0).reshape(b, length, -1))
        h = self.norm_2(x)
        return shard(x + self.outer(jax.nn.gelu(self.gate(h), approximate=True) * self.inner(h)))


class T5Encoder(nnx.Module):
    """Token ids to a `TextContext`. Build it through `networks.module.build`."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        normal = nnx.initializers.normal
        self.config = config
        self.token_embedding = draw(rngs, normal(1.0), (config.vocab_size, config.width))
        self.distance_bias = draw(rngs, normal(0.1), (config.buckets, config.heads))
        self.blocks = stack(lambda rngs: T5Layer(config, rngs), config.layers, rngs)
        self.norm = RMSNorm(config.width, epsilon=config.epsilon, dtype=compute_dtype(config))

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> TextContext:
        """Encodes a text.

        Args:
            tokens: `[B, L]` int32.
            mask: `[B, L]` float32, 1 for tokens to attend to and 0 for padding. None attends to the padding as well,
                which is how Stable Diffusion 3.5 was trained.

        Returns:
            sequence `[B, L, width]` and mask `[B, L]` (ones where none was given), float32. T5 has no vector for a
            whole text: pooled is `[B, 0]`, so that concatenation with the pooled vectors of others leaves those.
        """
        states, _ = self.states(tokens, mask)
        mask = jnp.ones(tokens.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
        return TextContext(states, mask, jnp.zeros((tokens.shape[0], 0), jnp.float32))

    def states(
        self, tokens: jax.Array, mask: jax.Array | None = None, *, taps: Sequence[int] = ()
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Last states `[B, L, width]` after the final norm, and those after each layer in `taps` before any norm."""
        config = self.config
        # The residual stream is float32: in the larger models it reaches thousands, where bfloat16 has steps of eight.
        x = shard(self.token_embedding[...].at[tokens].get(mode="clip").astype(jnp.float32))
        buckets = distance_buckets(tokens.shape[1], config.buckets, config.max_distance)
        bias = self.distance_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]  # [1, H, L, L]
        if mask is not None:
            bias = bias + mask_bias(mask)
        x, found = scan(lambda layer, x: layer(x, bias), self.blocks, x, taps=taps)
        return self.norm(x).astype(jnp.float32), found
