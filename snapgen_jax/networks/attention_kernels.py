"""Attention by each kernel of `attention_table.KERNELS`, and the masks that they share.

The einsum here, `attend`, is the form that every platform and every exported file knows. Nothing in it exceeds four
dimensions, and masks are additive floats: `jax.nn.dot_product_attention` reshapes to five, and a boolean `where` does
not compile on mobile GPUs. The other kernels never hold all scores: at 1024 px a teacher attends over 4429 tokens with
38 heads, 2.8 GiB of float32 scores an image in every block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from snapgen_jax.networks.attention_table import KERNELS, AttentionKernel
from snapgen_jax.networks.module import batch_axes

MASKED = -1e4  # large enough that exp(MASKED) is 0 in float32, small enough for float16
BLOCK = 512  # queries, and keys, of a tile of "flash"
CUDNN_TILE = 128  # keys of a tile of cuDNN's


# --- masks -----------------------------------------------------------------------------------------------------------


def mask_bias(mask: jax.Array) -> jax.Array:
    """`[B, L]`, 1 to attend and 0 to ignore -> `[B, 1, 1, L]` float32 to add to attention scores."""
    return ((1.0 - mask.astype(jnp.float32)) * MASKED)[:, None, None, :]


def causal_bias(length: int) -> jax.Array:
    """`[1, 1, L, L]` float32 to add to attention scores, so that no token sees a later one."""
    later = np.triu(np.ones((length, length), np.float32), k=1)
    return jnp.asarray(later * MASKED)[None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """What attention leaves out, in the forms that the kernels read.

    Attributes:
        bias: float32, broadcastable to `[B, H, L, M]`, to add to the scores. If it is `[B, 1, 1, M]`, it says of each
            key whether it counts (0) or not (`MASKED`); a row in which no key counts attends to all alike.
        lengths: int32 `[B]`, how many keys count, if these are the first ones; None if they may lie anywhere.
    """

    bias: jax.Array
    lengths: jax.Array | None = None


def key_mask(kernel: AttentionKernel, mask: jax.Array) -> Mask:
    """The mask `[B, M]`, 1 to attend and 0 to ignore, for a kernel. One that counts the first keys needs them first:
    see `real_first`."""
    if KERNELS[kernel].masks != "first keys":
        return Mask(mask_bias(mask))
    count = jnp.sum(mask > 0.5, axis=1, dtype=jnp.int32)
    return Mask(mask_bias(mask), jnp.where(count == 0, mask.shape[1], count))


def real_first(kernel: AttentionKernel, sequence: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens `[B, L, D]` and their mask `[B, L]`, those that count first and otherwise in their order, if the kernel
    needs that; unchanged if not.

    Attention does not depend on the order of keys without positions. The texts of several encoders, one after the
    other, have padding in between.
    """
    if KERNELS[kernel].masks != "first keys":
        return sequence, mask
    order = jnp.argsort(mask <= 0.5, axis=1, stable=True)
    return jnp.take_along_axis(sequence, order[:, :, None], axis=1), jnp.take_along_axis(mask, order, axis=1)


# --- kernels ---------------------------------------------------------------------------------------------------------


def attend_by(
    kernel: AttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | None = None,
    *,
    chunk: int = 512,
) -> jax.Array:
    """Scaled dot-product attention by a kernel; all of them agree up to rounding.

    Args:
        kernel: "whole" forms all scores at once; "chunked" those of `chunk` queries at a time, forward and backward, on
            any platform; "cudnn" (NVIDIA GPUs) and "flash" (TPUs) never form them. A call that the kernel does not take
            (`attention_table.KERNELS`) runs by "whole", and so does "cudnn" in a process that only looks at the shapes
            of a network for GPUs and has no cuDNN.
        q: `[B, L, H, D]`.
        k, v: `[B, M, K, D]`, where K divides H as for `attend`.
        mask: what is left out, for example by `key_mask`; None for nothing.
        chunk: most queries at a time.

    Returns:
        `[B, L, H, D]` in the dtype of v.
    """
    if not KERNELS[kernel].takes(q, k, v, mask):
        kernel = "whole"
    bias = None if mask is None else mask.bias
    match kernel:
        case "whole":
            return attend(q, k, v, bias)
        case "chunked":
            return _attend_chunked(q, k, v, bias, chunk)
        case "cudnn":
            lengths = None if mask is None else mask.lengths
            try:
                return _on_each_device(_cudnn_on_a_device, q, k, v, lengths)
            except RuntimeError:  # JAX's, that cuDNN is not there
                if jax.default_backend() == "gpu":
                    raise
                return attend(q, k, v, bias)
        case "flash":
            return _on_each_device(_flash_on_a_device, q, k, v, bias)


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


def _attend_chunked(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, chunk: int) -> jax.Array:
    b, length, heads, dim = q.shape
    chunks = -(-length // chunk)
    if chunks == 1:
        return attend(q, k, v, bias)
    size = -(-length // chunks)  # equal parts, so that fewer than `chunks` rows are padding
    q = jnp.pad(q, ((0, 0), (0, chunks * size - length), (0, 0), (0, 0)))
    q = q.reshape(b, chunks, size, heads, dim).swapaxes(0, 1)
    # Without the checkpoint the backward pass would keep the weights of all chunks, which is the matrix again.
    part = jax.checkpoint(lambda q: attend(q, k, v, bias), prevent_cse=False)
    y = jax.lax.map(part, q).swapaxes(0, 1)
    return y.reshape(b, chunks * size, heads, dim)[:, :length]


def _on_each_device(run: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *rows: Any) -> jax.Array:
    """`run(q, k, v, *rows)`, each device of the mesh on its share of the batch, and of the heads if both those of the
    queries and of the keys divide among the axis `tensor`. `rows`: further arrays `[B, ...]`, or None."""
    axes = batch_axes()
    if not axes:
        return run(q, k, v, *rows)
    parts = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    shared = k.shape[2] == 1 or k.shape[2] % parts == 0
    of_heads = PartitionSpec(axes, None, "tensor" if parts > 1 and q.shape[2] % parts == 0 and shared else None)
    of_keys = of_heads if k.shape[2] % parts == 0 else PartitionSpec(axes)
    specs = (of_heads, of_keys, of_keys, *(None if array is None else PartitionSpec(axes) for array in rows))
    return jax.shard_map(run, in_specs=specs, out_specs=of_heads, check_vma=False)(q, k, v, *rows)


def _cudnn_on_a_device(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """cuDNN's flash attention, which takes fewer heads of keys than of queries as they are. Its gradient takes even
    numbers of queries and of keys alone."""
    if lengths is None and k.shape[1] % CUDNN_TILE:
        # Told the number of keys, cuDNN counts those beyond it in its last tile as absent; otherwise the gradient on
        # Hopper may be NaN (github.com/NVIDIA/cudnn-frontend/issues/160).
        lengths = jnp.full(k.shape[0], k.shape[1], jnp.int32)
    queries = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) if x.shape[1] % 2 else x for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return y[:, :queries]


def _flash_on_a_device(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """JAX's own kernel for TPUs (Dao et al. 2022, "FlashAttention")."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu  # imports Mosaic, which only TPUs need

    def tiled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, H, L', D]` of whole tiles, and which of `[B, L']` is no padding."""
        batch, length, *_ = x.shape
        tile = min(BLOCK, -(-length // 128) * 128)
        more = -length % tile
        real = jnp.pad(jnp.ones((batch, length), jnp.int32), ((0, 0), (0, more)))
        return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2), real

    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
    (queries, q_real), (keys, k_real), (values, _) = map(tiled, (q, k, v))
    if bias is not None:
        counts = bias[:, 0, 0] > MASKED / 2
        counts |= ~jnp.any(counts, axis=1, keepdims=True)
        k_real *= jnp.pad(counts.astype(jnp.int32), ((0, 0), (0, k_real.shape[1] - counts.shape[1])))
    q_tile, k_tile = min(BLOCK, queries.shape[2]), min(BLOCK, keys.shape[2])
    tiles = tpu.BlockSizes(
        block_q=q_tile,
        block_k_major=k_tile,
        block_k=k_tile,
        block_b=1,
        block_q_major_dkv=q_tile,
        block_k_major_dkv=k_tile,
        block_k_dkv=k_tile,
        block_q_dkv=q_tile,
        block_k_major_dq=k_tile,
        block_k_dq=k_tile,
        block_q_dq=q_tile,
    )
    y = tpu.flash_attention(
        queries,
        keys,
        values,
        segment_ids=tpu.SegmentIds(q=q_real, kv=k_real),  # what is real attends to what is real
        sm_scale=q.shape[-1] ** -0.5,
        block_sizes=tiles,
    )
    return y.swapaxes(1, 2)[:, : q.shape[1]].astype(v.dtype)
