"""Attention over thousands of tokens, where the matrix of scores must not exist as a whole.

At 1024 px the teacher attends over 4429 tokens with 38 heads: 2.8 GiB of float32 scores an image in every block.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from snapgen_jax.networks.attention import attend

AttentionKernel = Literal["whole", "chunked", "cudnn"]


def attend_long(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    kernel: AttentionKernel,
    chunk: int = 512,
) -> jax.Array:
    """Multi-head attention by one of three kernels that agree up to rounding.

    Args:
        q: `[B, L, H, D]`.
        k, v: `[B, M, H, D]`.
        bias: float32 `[B, 1, 1, M]`, added to the scores of every query.
        kernel: "whole" forms all scores at once; "chunked" those of `chunk` queries at a time, forward and backward, on
            any platform; "cudnn" never forms them (NVIDIA GPUs, bfloat16, without bias).
        chunk: most queries at a time.

    Returns:
        `[B, L, H, D]` in the dtype of v.

    Raises:
        ValueError: a bias is given to "cudnn", which would need one the size of the scores.
    """
    match kernel:
        case "whole":
            return attend(q, k, v, bias)
        case "chunked":
            return _attend_chunked(q, k, v, bias, chunk)
        case "cudnn":
            if bias is not None:
                raise ValueError("the cudnn kernel takes no bias; use the chunked kernel where attention has a mask")
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


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
