"""The block of the MMDiT: two streams of tokens, image and text, with weights of their own, that meet in one attention.

Esser et al. 2024 (arXiv 2403.03206), figure 2b; Stable Diffusion 3.5 Medium adds a second attention among the image
tokens alone ("MMDiT-X").
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from snapgen_jax.networks.attention_kernels import Mask, attend_by
from snapgen_jax.networks.attention_table import AttentionKernel, kernel_of
from snapgen_jax.networks.layers import Linear, RMSNorm, mean_square
from snapgen_jax.networks.mmdit_config import MMDiTArchitecture
from snapgen_jax.networks.module import compute_dtype, shard
from snapgen_jax.networks.taps import NO_TAPS, Taps

EPSILON = 1e-6
Heads = tuple[jax.Array, jax.Array, jax.Array]
Kind = Literal["joint", "dual", "last"]


def layer_norm(x: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """Layer normalisation of the last axis without gain or bias; float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square(x) + epsilon)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x (1 + scale) + shift` with x `[B, L, D]` and vectors `[B, D]` (Peebles and Xie 2023, section 3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Projections(nnx.Module):
    """From tokens `[B, L, D]` to queries, keys and values `[B, L, H, D/H]`, and back.

    Queries and keys pass an RMSNorm over the head width (section 5.3.2 of the paper). `back` is absent where a stream
    is only read.
    """

    def __init__(self, config: MMDiTArchitecture, rngs: nnx.Rngs, *, back: bool = True):
        width, dtype = config.width, compute_dtype(config)
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, dtype=dtype, rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, epsilon=EPSILON, dtype=dtype)
        self.key_norm = RMSNorm(config.head_dim, epsilon=EPSILON, dtype=dtype)
        self.back = Linear(width, width, dtype=dtype, rngs=rngs) if back else None
        self.heads = config.heads

    def split(self, x: jax.Array) -> Heads:
        """Queries, keys and values."""
        q, k, v = (part(x).reshape(*x.shape[:2], self.heads, -1) for part in (self.query, self.key, self.value))
        return self.query_norm(q), self.key_norm(k), v

    def merge(self, y: jax.Array) -> jax.Array:
        """`[B, L, H, D/H] -> [B, L, D]`."""
        assert self.back is not None
        return self.back(y.reshape(*y.shape[:2], -1))


class FeedForward(nnx.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.inner = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.outer = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(jax.nn.gelu(self.inner(x), approximate=True))


class Stream(nnx.Module):
    """One of the two streams of a block. A stream that is only read by the other ("read") gives keys and values and
    ends there: its modulation is (scale, shift), in this order, and it has no feed-forward network.
    """

    def __init__(self, config: MMDiTArchitecture, role: Literal["full", "dual", "read"], rngs: nnx.Rngs):
        parts, width, dtype = {"full": 6, "dual": 9, "read": 2}[role], config.width, compute_dtype(config)
        full = role != "read"
        self.modulation = Linear(width, parts * width, init="zeros", dtype=dtype, rngs=rngs)
        self.attention = Projections(config, rngs, back=full)
        self.self_attention = Projections(config, rngs) if role == "dual" else None
        self.feed_forward = FeedForward(width, config.ffn_ratio * width, dtype=dtype, rngs=rngs) if full else None
        self.parts = parts

    def modulations(self, embedding: jax.Array) -> list[jax.Array]:
        """The modulation vectors, each `[B, D]`."""
        return jnp.split(self.modulation(embedding), self.parts, axis=-1)

    def finish(self, x: jax.Array, y: jax.Array, modulations: list[jax.Array]) -> jax.Array:
        """Adds what attention found, `y` `[B, L, H, D/H]`, or merged `[B, L, D]`, to the stream."""
        return x + modulations[2][:, None] * (y if y.ndim == 3 else self.attention.merge(y))

    def feed(self, x: jax.Array, modulations: list[jax.Array], tap: Taps, name: str) -> jax.Array:
        """The feed-forward half of the block, whose network is the intermediate called `name`."""
        assert self.feed_forward is not None
        shift, scale, gate = modulations[3:6]
        return x + gate[:, None] * tap.entered(name, self.feed_forward, modulate(layer_norm(x), shift, scale), x.dtype)


def inner_names(kind: Kind) -> tuple[str, ...]:
    """Names of the intermediates inside a block: what enters a module, modulated, and what leaves it, not gated yet.

    The joint attention is one module: tokens `[B, N + L, D]`, the image's first, enter and leave it.
    """
    modules = ("attention", *(["self_attention"] if kind == "dual" else []), "ffn")
    modules = modules if kind == "last" else (*modules, "text_ffn")
    return tuple(name for module in modules for name in (f"{module}_input", module))


class Block(nnx.Module):
    """One MMDiT block.

    Args:
        kind: "joint"; "dual" (the image tokens also attend among themselves); or "last" (the text is only read).
    """

    def __init__(self, config: MMDiTArchitecture, kind: Kind, rngs: nnx.Rngs):
        self.image = Stream(config, "dual" if kind == "dual" else "full", rngs)
        self.text = Stream(config, "read" if kind == "last" else "full", rngs)
        self.kernel: AttentionKernel = kernel_of(config)
        self.chunk = config.attention_chunk

    def __call__(
        self, image: jax.Array, text: jax.Array, embedding: jax.Array, mask: Mask | None, tap: Taps = NO_TAPS
    ) -> tuple[jax.Array, jax.Array]:
        """Updates both streams.

        Args:
            image: `[B, N, D]` tokens.
            text: `[B, L, D]` tokens.
            embedding: `[B, D]` of time and pooled text, already activated.
            mask: of the N + L keys of the joint attention.
            tap: of the intermediates that `inner_names` lists.
        """
        normed, of_image = layer_norm(image), self.image.modulations(embedding)
        of_text = self.text.modulations(embedding)
        read_only = self.text.feed_forward is None
        text_shift, text_scale = reversed(of_text) if read_only else of_text[:2]

        def of_image_tokens() -> jax.Array:
            return modulate(normed, *of_image[:2])

        def of_text_tokens() -> jax.Array:
            return modulate(layer_norm(text), text_shift, text_scale)

        length = image.shape[1]
        if tap.touches("attention_input", "attention"):
            joined = jnp.concatenate([of_image_tokens(), of_text_tokens()], axis=1)
            y = tap.entered("attention", lambda z: self._merged(z, length, mask), joined, image.dtype)
        else:
            heads = self.image.attention.split(of_image_tokens()), self.text.attention.split(of_text_tokens())
            y = self._joint(*heads, length, mask)

        image = self.image.finish(image, y[:, :length], of_image)
        if (dual := self.image.self_attention) is not None:
            shift, scale, gate = of_image[6:]
            entering = modulate(normed, shift, scale)

            def attend(z: jax.Array) -> jax.Array:
                return dual.merge(self._attend(*dual.split(z), None))

            image = image + gate[:, None] * tap.entered("self_attention", attend, entering, image.dtype)
        image = shard(self.image.feed(image, of_image, tap, "ffn"), "tokens")
        if not read_only:
            text = self.text.finish(text, y[:, length:], of_text)
            text = shard(self.text.feed(text, of_text, tap, "text_ffn"), "tokens")
        return image, text

    def _joint(self, image: Heads, text: Heads, length: int, mask: Mask | None) -> jax.Array:
        """What both streams find, `[B, N + L, H, D/H]`; that of N = `length` image tokens alone in the last block."""
        q, k, v = (jnp.concatenate(part, axis=1) for part in zip(image, text, strict=True))  # image tokens first
        if self.text.feed_forward is None:
            q = q[:, :length]  # nothing follows from what the text tokens would find
        return self._attend(q, k, v, mask)

    def _merged(self, tokens: jax.Array, length: int, mask: Mask | None) -> jax.Array:
        """The same of joined tokens `[B, N + L, D]`, with the heads merged as each stream does: `[B, N + L, D]`."""
        image, text = self.image.attention, self.text.attention
        y = self._joint(image.split(tokens[:, :length]), text.split(tokens[:, length:]), length, mask)
        found = image.merge(y[:, :length])
        return found if text.back is None else jnp.concatenate([found, text.merge(y[:, length:])], axis=1)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask | None) -> jax.Array:
        return attend_by(self.kernel, q, k, v, mask, chunk=self.chunk)
