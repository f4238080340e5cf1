"""The attention layer: multi-head, grouped-query and multi-query, with QK-RMSNorm and 2-D RoPE."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from snapgen_jax.networks.attention_kernels import Mask, attend_by
from snapgen_jax.networks.attention_table import AttentionKernel
from snapgen_jax.networks.layers import Init, Linear, RMSNorm


def rope_table(height: int, width: int, dim: int, theta: float = 10_000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of 2-D axial rotary positions, each `[H*W, dim / 2]` float32 constants.

    Of the dim/2 rotated pairs the first half turns with the row and the second with the column, at the frequencies
    `theta^(-i / (dim/4))` (Su et al. 2021, equation 15, once an axis).

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"2-D rotary positions need a head width that is a multiple of 4, not {dim}")
    frequencies = theta ** -(np.arange(dim // 4) / (dim // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = np.concatenate(
        [rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], axis=-1
    )  # [H*W, dim/2]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: jax.Array, table: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Turns the pairs (x_i, x_{i + D/2}) of `[B, L, H, D]` by the angles of a table; computed in float32."""
    cos, sin = (part[None, :, None, :] for part in table)  # [1, L, 1, D/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Attention from `[B, L, width]` to a context `[B, M, context_width]` (to itself where none is given).

    Args:
        heads, head_dim: heads of the queries and their width.
        kv_heads: heads of the keys and values; None for as many as the queries have.
        qk_norm: RMSNorm of queries and keys over the head width, with a gain each.
        qkv_bias, key_bias: bias of the query and value projections, and of the key projection. Softmax removes a key
            bias exactly; it exists for published checkpoints that hold one.
        out_init: initial kernel of the output projection.
        kernel, chunk: of the attention, see `attention_kernels.attend_by`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        context_width: int | None = None,
        kv_heads: int | None = None,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        key_bias: bool = False,
        out_init: Init = "fan_in",
        kernel: AttentionKernel = "whole",
        chunk: int = 512,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"Attention: {kv_heads} key heads do not divide {heads} query heads; change `kv_heads`")
        source = width if context_width is None else context_width
        self.query = Linear(width, heads * head_dim, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.key = Linear(source, kv_heads * head_dim, bias=key_bias, dtype=dtype, rngs=rngs)
        self.value = Linear(source, kv_heads * head_dim, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(heads * head_dim, width, init=out_init, dtype=dtype, rngs=rngs)
        self.query_norm = RMSNorm(head_dim, dtype=dtype) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, dtype=dtype) if qk_norm else None
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.kernel: AttentionKernel = kernel
        self.chunk = chunk

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        mask: Mask | None = None,
        rope: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> jax.Array:
        source = x if context is None else context
        q = self._split(self.query(x), self.heads)
        k = self._split(self.key(source), self.kv_heads)
        v = self._split(self.value(source), self.kv_heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = checkpoint_name(attend_by(self.kernel, q, k, v, mask, chunk=self.chunk), "attention")
        return self.out(y.reshape(*y.shape[:2], self.heads * self.head_dim))

    def _split(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)  # [B, L, heads, D]
