"""Attention by hand-written einsum: multi-head, grouped-query and multi-query, with QK-RMSNorm and 2-D RoPE.

Nothing here exceeds four dimensions, and masks are additive floats: `jax.nn.dot_product_attention` reshapes to five,
and a boolean `where` does not compile on mobile GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from snapgen_jax.networks.layers import Init, Linear, RMSNorm

MASKED = -1e4  # large enough that exp(MASKED) is 0 in float32, small enough for float16


def mask_bias(mask: jax.Array) -> jax.Array:
    """`[B, L]`, 1 to attend and 0 to ignore -> `[B, 1, 1, L]` float32 to add to attention scores."""
    return ((1.0 - mask.astype(jnp.float32)) * MASKED)[:, None, None, :]


def causal_bias(length: int) -> jax.Array:
    """`[1, 1, L, L]` float32 to add to attention scores, so that no token sees a later one."""
    later = np.triu(np.ones((length, length), np.float32), k=1)
    return jnp.asarray(later * MASKED)[None, None]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1); scores and softmax are float32.

    Args:
        q: `[B, L, H, D]`.
        k, v: `[B, M, K, D]`, where K = H (multi-head), 1 (multi-query, Shazeer 2019) or a divisor of H (grouped-query,
            Ainslie et al. 2023); query heads `g*H/K ... (g+1)*H/K - 1` share key head g.
        bias: float32, broadcastable to `[B, H, L, M]`.
        scale: factor of the scores; None for `D^-1/2`.
        softcap: bounds the scaled scores s to `softcap * tanh(s / softcap)` before the bias (Gemma 2, section 2).

    Returns:
        `[B, L, H, D]` in the dtype of v.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if 1 < kv_heads < heads:
        parts = zip(
            jnp.split(q, kv_heads, axis=2), jnp.split(k, kv_heads, axis=2), jnp.split(v, kv_heads, axis=2), strict=True
        )
        return jnp.concatenate([attend(*part, bias, scale=scale, softcap=softcap) for part in parts], axis=2)
    keys = "bmhd" if kv_heads == heads else "bmd"
    if kv_heads != heads:
        k, v = k[:, :, 0], v[:, :, 0]
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum(f"blhd,{keys}->bhlm", q * factor, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum(f"bhlm,{keys}->blhd", weights, v)


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

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        bias: jax.Array | None = None,
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
        y = checkpoint_name(attend(q, k, v, bias), "attention")
        return self.out(y.reshape(*y.shape[:2], self.heads * self.head_dim))

    def _split(self, x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, self.head_dim)  # [B, L, heads, D]
