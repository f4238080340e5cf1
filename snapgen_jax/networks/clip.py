"""The CLIP text transformer (Radford et al. 2021, section 2.4), tiny or full-size by config."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.attention import Attention
from snapgen_jax.networks.attention_kernels import Mask, causal_bias, mask_bias
from snapgen_jax.networks.layers import LayerNorm, Linear
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, draw, shard
from snapgen_jax.networks.text import TextContext

__all__ = ["ClipText", "ClipTextConfig", "null_tokens"]

_RULES: Rules = [
    (r"token_embedding$", PartitionSpec("fsdp", None)),
    (r"(query|key|value|inner)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|outer|projection)/kernel$", PartitionSpec("tensor", "fsdp")),
]

_PUBLISHED: dict[str, Any] = {
    "vocab_size": 49408,
    "max_tokens": 77,
    "bos_id": 49406,
    "eos_id": 49407,
    "pooling": "argmax",
    "output": "penultimate",
    "key_bias": True,
}
_LARGE: dict[str, Any] = {**_PUBLISHED, "width": 768, "layers": 12, "heads": 12, "pad_id": 49407}
_MIDDLE: dict[str, Any] = {"width": 1024, "layers": 24, "heads": 16, "projection": 1024, "activation": "gelu"}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(Preset):
    """Architecture of a `ClipText`. The defaults are those of the shapes world.

    Attributes:
        vocab_size, max_tokens: sizes of the token and position tables.
        width, layers, heads: of the transformer; its feed-forward network is four times as wide.
        projection: width of the pooled vector; None for the last state itself.
        activation: `x sigmoid(1.702 x)` or the exact GELU.
        bos_id, eos_id, pad_id: special tokens.
        pooling: the pooled state is that of the first `eos_id` ("eos"), or of the largest id ("argmax", as in the first
            CLIP, whose end token has the largest id).
        output: the sequence is the input of the last layer without a norm ("penultimate"), or the last layer's output
            after the final norm ("last").
        key_bias: whether the key projection has a bias. Softmax removes it exactly, so it can never be trained;
            published checkpoints hold one.
        attention: a token sees those before it ("causal", as in CLIP), or all ("full"), so that "a ring left of a star"
            tells the ring where it belongs.
        neighbours: a token begins as its own embedding and those of so many tokens on either side (before it, if
            attention is causal), each weighted by channel: a short depthwise convolution. Attention learns only slowly
            that in "a red ring and a blue star" red belongs to the ring, since a bag of words explains most of a
            picture; here it is there from the start. CLIP has none.
        embedding_std: standard deviation of the first token embeddings; positions have half of it. CLIP begins at 0.02,
            where the first layers' outputs drown which token stands where. At 1 the states tell the tokens apart from
            the start, and a network that is trained jointly follows captions sooner.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["clip_text"] = "clip_text"
    vocab_size: int = 512
    width: int = 128
    layers: int = 2
    heads: int = 4
    max_tokens: int = 32
    projection: int | None = 128
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    pooling: Literal["eos", "argmax"] = "eos"
    output: Literal["penultimate", "last"] = "last"
    key_bias: bool = False
    attention: Literal["causal", "full"] = "causal"
    neighbours: int = 0
    embedding_std: float = 0.02
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"ClipTextConfig: {self.heads} heads do not divide width={self.width}; change one of them")

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward networks."""
        return 4 * self.width

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the text encoder with freshly drawn parameters."""
        return ClipText(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, tokens: int = 77) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`ShapeDtypeStruct`s of a `ClipText`'s positional arguments, tokens and mask; no longer than `max_tokens`."""
        length = min(tokens, self.max_tokens)
        return jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch, length), jnp.float32)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"vocab_size": 32, "width": 16, "heads": 2, "max_tokens": 8, "projection": 16},
        "shapes": {},
        "clip_l": {**_LARGE, "projection": 768},
        "sd15": {**_LARGE, "projection": None, "output": "last"},  # CLIP-L as Stable Diffusion 1 reads it
        "clip_h": {**_PUBLISHED, **_MIDDLE},
        "clip_little_g": {**_PUBLISHED, **_MIDDLE},  # g/14's text half has the sizes of H/14's
        "clip_g": {
            **_PUBLISHED,
            "width": 1280,
            "layers": 32,
            "heads": 20,
            "projection": 1280,
            "activation": "gelu",
        },
    }


class ClipLayer(nnx.Module):
    """Self-attention and a feed-forward network, each with a LayerNorm before and a residual.

    `config` is a `ClipTextConfig` or a `clip_vision.ClipVisionConfig`.
    """

    def __init__(self, config: Any, rngs: nnx.Rngs):
        width, dtype = config.width, compute_dtype(config)
        self.norm_1 = LayerNorm(width, dtype=dtype)
        self.attention = Attention(
            width,
            config.heads,
            width // config.heads,
            qkv_bias=True,
            key_bias=config.key_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm_2 = LayerNorm(width, dtype=dtype)
        self.inner = Linear(width, config.hidden_width, dtype=dtype, rngs=rngs)
        self.outer = Linear(config.hidden_width, width, dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        x = x + self.attention(self.norm_1(x), mask=None if bias is None else Mask(bias))
        h = self.inner(self.norm_2(x))
        h = h * jax.nn.sigmoid(1.702 * h) if self.activation == "quick_gelu" else gelu(h)
        return x + self.outer(h)


def gelu(x: jax.Array) -> jax.Array:
    """`x (1 + erf(x / sqrt(2))) / 2`, `[...] -> [...]`.

    `jax.nn.gelu` computes it with erfc, whose branches no mobile GPU runs, and `jax.lax.erf` lowers to an operation
    that TensorFlow does not read. This erf is the rational function of XLA and Eigen, right to 4e-7.
    """
    y = x.astype(jnp.float32)  # bfloat16 would lose the left tail to the sum
    z = jnp.clip(y * 0.5**0.5, -_ERF_ONE, _ERF_ONE)
    square = z * z
    erf = z * _polynomial(_ERF_ABOVE, square) / _polynomial(_ERF_BELOW, square)
    return (0.5 * y * (1 + erf)).astype(x.dtype)


_ERF_ONE = 3.7439211627767994  # erf is one from here on, in float32
_ERF_ABOVE = (
    2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 1.8520832239976145e-1, 1.128379143519084,
)  # fmt: skip
_ERF_BELOW = (
    -1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3, 1.4070470171167667e-2, 1.1098505178285362e-1,
    4.9746925110067538e-1, 1.0,
)  # fmt: skip


def _polynomial(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
    """From the highest power to the constant."""
    y = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


class Neighbours(nnx.Module):
    """Adds to each embedding those of its neighbours, each weighted by channel. Padding counts as nothing."""

    def __init__(self, config: ClipTextConfig, rngs: nnx.Rngs):
        n = config.neighbours
        self.offsets = (*range(-n, 0), *(range(1, n + 1) if config.attention == "full" else ()))
        self.kernel = nnx.Param(0.5 * jax.random.normal(rngs.params(), (len(self.offsets), config.width)))
        self.reach = n

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """`[B, L, C] -> [B, L, C]`; mask `[B, L]`."""
        length, reach = x.shape[1], self.reach
        padded = jnp.pad(x * mask[..., None], ((0, 0), (reach, reach), (0, 0)))
        for i, offset in enumerate(self.offsets):
            x = x + self.kernel[i] * padded[:, reach + offset : reach + offset + length]
        return x


class ClipText(nnx.Module):
    """Token ids to a `TextContext`. Build it through `networks.module.build`."""

    def __init__(self, config: ClipTextConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        tokens, positions = (nnx.initializers.normal(std * config.embedding_std) for std in (1.0, 0.5))
        self.config = config
        self.token_embedding = draw(rngs, tokens, (config.vocab_size, config.width))
        self.position_embedding = draw(rngs, positions, (config.max_tokens, config.width))
        self.neighbours = Neighbours(config, rngs) if config.neighbours else None
        self.layers = nnx.List([ClipLayer(config, rngs) for _ in range(config.layers)])
        self.norm = LayerNorm(config.width, dtype=dtype)
        self.projection = (
            Linear(config.width, config.projection, bias=False, dtype=dtype, rngs=rngs) if config.projection else None
        )

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> TextContext:
        """Encodes a text.

        With causal attention, padding on the right changes no state before it and `mask` is only passed on, for the
        network that attends to the states; with full attention no state sees the padding.

        Args:
            tokens: `[B, L]` int32, L <= max_tokens.
            mask: `[B, L]` float32, 1 for tokens and 0 for padding.

        Returns:
            sequence `[B, L, width]`, mask `[B, L]` and pooled `[B, projection]`, float32.

        Raises:
            ValueError: the text is longer than `max_tokens`.
        """
        return self.part(tokens, mask, None, 0, self.config.layers)

    def part(self, tokens: jax.Array, mask: jax.Array, x: jax.Array | None, first: int, last: int) -> Any:
        """Runs the layers `first` up to `last`, for an encoder that is exported in several files.

        Args:
            tokens, mask: of the text, as for the whole encoder.
            x: states `[B, L, width]` before layer `first`; None where that is 0.
            first, last: of all the layers.

        Returns:
            The states before layer `last`; the `TextContext` where `last` is the number of layers.

        Raises:
            ValueError: the text is longer than `max_tokens`.
        """
        config, length = self.config, tokens.shape[1]
        if length > config.max_tokens:
            raise ValueError(f"ClipText: {length} tokens given, but max_tokens={config.max_tokens}; truncate the text")
        x = self._embed(tokens, mask) if x is None else x
        bias, penultimate = causal_bias(length) if config.attention == "causal" else mask_bias(mask), x
        for layer in self.layers[first:last]:
            penultimate, x = x, layer(x, bias)
        return x if last < config.layers else self._read(x, penultimate, tokens, mask)

    def _embed(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        # "clip" spares the export nine operators that would only handle ids outside the table.
        x = self.token_embedding[...].at[tokens].get(mode="clip")
        if self.neighbours is not None:
            x = self.neighbours(x, mask)
        x = x + self.position_embedding[: tokens.shape[1]]
        return shard(x.astype(compute_dtype(self.config)), "tokens")

    def _read(self, x: jax.Array, penultimate: jax.Array, tokens: jax.Array, mask: jax.Array) -> TextContext:
        config, last = self.config, self.norm(x)
        ends = tokens if config.pooling == "argmax" else (tokens == config.eos_id).astype(jnp.float32)
        # A product with a one-hot row: a gather would not run on mobile GPUs.
        one_hot = jax.nn.one_hot(jnp.argmax(ends, axis=-1), tokens.shape[1], dtype=last.dtype)
        pooled = jnp.einsum("bl,bld->bd", one_hot, last)
        if self.projection is not None:
            pooled = self.projection(pooled)
        sequence = last if config.output == "last" else penultimate
        return TextContext(sequence.astype(jnp.float32), mask.astype(jnp.float32), pooled.astype(jnp.float32))


def null_tokens(config: ClipTextConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The empty text: tokens `[L]` int32 (BOS, EOS, padding) and mask `[L]` float32."""
    tokens = np.full(length, config.pad_id, np.int32)
    tokens[:2] = config.bos_id, config.eos_id
    mask = np.zeros(length, np.float32)
    mask[:2] = 1
    return tokens, mask
