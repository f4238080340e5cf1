"""Attention over thousands of tokens, where the matrix of scores must not exist as a whole.

At 1024 px the teacher attends over 4429 tokens with 38 heads: 2.8 GiB of float32 scores an image in every block.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from snapgen_jax.networks.attention import attend
from snapgen_jax.networks.module import batch_axes

AttentionKernel = Literal["whole", "chunked", "cudnn", "flash"]
BLOCK = 512  # queries, and keys, of a tile of "flash"


def attend_long(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    kernel: AttentionKernel,
    chunk: int = 512,
) -> jax.Array:
    """Multi-head attention by one of four kernels that agree up to rounding.

    Args:
        q: `[B, L, H, D]`.
        k, v: `[B, M, H, D]`.
        bias: float32 `[B, 1, 1, M]`, added to the scores of every query.
        kernel: "whole" forms all scores at once; "chunked" those of `chunk` queries at a time, forward and backward, on
            any platform; "cudnn" (NVIDIA GPUs, bfloat16) and "flash" (TPUs) never form them, and take no bias.
        chunk: most queries at a time.

    Returns:
        `[B, L, H, D]` in the dtype of v.

    Raises:
        ValueError: a bias is given to "cudnn" or "flash", which would need one the size of the scores.
    """
    if bias is not None and kernel in ("cudnn", "flash"):
        raise ValueError(f"the {kernel} kernel takes no bias; use the chunked kernel where attention has a mask")
    match kernel:
        case "whole":
            return attend(q, k, v, bias)
        case "chunked":
            return _attend_chunked(q, k, v, bias, chunk)
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        case "flash":
            return _attend_flash(q, k, v)


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


def _attend_flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's own kernel for TPUs (Dao et al. 2022, "FlashAttention"), each device on its share of the batch."""
    axes = batch_axes()
    if not axes:
        return _flash_on_a_device(q, k, v)
    split = jax.sharding.PartitionSpec(axes)
    return jax.shard_map(_flash_on_a_device, in_specs=split, out_specs=split, check_vma=False)(q, k, v)


def _flash_on_a_device(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu  # imports Mosaic, which only TPUs need

    def tiled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, H, L', D]` of whole tiles, and which of `[B, L']` is no padding."""
        batch, length, *_ = x.shape
        tile = min(BLOCK, -(-length // 128) * 128)
        more = -length % tile
        real = jnp.pad(jnp.ones((batch, length), jnp.int32), ((0, 0), (0, more)))
        return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2), real

    (queries, q_real), (keys, k_real), (values, _) = map(tiled, (q, k, v))
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
