"""The first half of a separable convolution block as one kernel for TPUs: a normalised image, SiLU, depthwise 3x3 and
pointwise convolution, without an image written in between.

Composed of XLA's operations the same writes the activated image and the depthwise result to memory and reads both
again, and these blocks wait for memory most of the time. The kernel reads the image once, keeps what comes between in
the vector memory, and writes the result.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from snapgen_jax.networks.depthwise import depthwise
from snapgen_jax.networks.layers import pointwise
from snapgen_jax.networks.module import batch_axes

VMEM_LIMIT = 64 * 2**20  # of the 128 MiB beside the arithmetic of v5e, v5p and v6e; the compiler's default is 16
BUDGET = 24 * 2**20  # bytes of a block's float32 image in its four copies: as read, and shifted by each column


class Norm(NamedTuple):
    """What a GroupNorm does to each channel of an image, float32 `[B, C]` each: `(x - mean) * gain + bias`."""

    mean: jax.Array
    gain: jax.Array
    bias: jax.Array


def composed(
    x: jax.Array, norm: Norm, kernel: jax.Array, depthwise_bias: jax.Array, weights: jax.Array, offset: jax.Array
) -> jax.Array:
    """What `fused` computes, by XLA's own operations; arguments and result as there."""
    mean, gain, bias = (part[:, None, None, :] for part in norm)
    h = jax.nn.silu(((x.astype(jnp.float32) - mean) * gain + bias).astype(x.dtype))
    h = depthwise(h, kernel.astype(x.dtype)) + depthwise_bias.astype(x.dtype)
    return pointwise(h, weights.astype(x.dtype)) + offset.astype(x.dtype)[:, None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def fused(
    x: jax.Array,
    norm: Norm,
    kernel: jax.Array,
    depthwise_bias: jax.Array,
    weights: jax.Array,
    offset: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """One kernel; see the top of this file. Between the read and the matrix product everything is float32.

    The backward pass keeps the arguments alone, and computes what lies between anew by XLA's operations.

    Args:
        x: `[B, H, W, C]`, bfloat16 or float32.
        norm: float32 `[B, C]` each.
        kernel: `[3, 3, 1, C]`, of the depthwise convolution.
        depthwise_bias: `[C]`.
        weights: `[1, 1, C, O]`, of the pointwise convolution.
        offset: `[B, O]`, added to every pixel: the time embedding.
        interpret: runs anywhere, slowly; to test.

    Returns:
        `[B, H, W, O]` in the dtype of x.
    """
    axes = batch_axes()
    run = functools.partial(_on_a_device, interpret=interpret)
    if axes:
        split, whole = PartitionSpec(axes), PartitionSpec()
        run = jax.shard_map(run, in_specs=(split, split, whole, whole, whole, split), out_specs=split, check_vma=False)
    return run(x, norm, kernel, depthwise_bias, weights, offset)


def _forward(x: jax.Array, *rest: Any) -> tuple[jax.Array, Any]:
    *arguments, interpret = rest
    return fused(x, *arguments, interpret), (x, *arguments)


def _backward(interpret: bool, kept: Any, dy: jax.Array) -> Any:
    del interpret
    return jax.vjp(composed, *kept)[1](dy)


fused.defvjp(_forward, _backward)


class Blocks(NamedTuple):
    """How the kernel walks over images: so many images and rows at a time. Of several images all rows are taken."""

    images: int
    rows: int


def blocks(shape: tuple[int, ...]) -> Blocks:
    """The largest blocks of `[B, H, W, C]` that fit into `BUDGET`, by whole divisors."""
    images, height, width, channels = shape
    row = 16 * width * channels  # bytes of four float32 copies

    def largest(count: int, fits: Any) -> int:
        return max((n for n in range(1, count + 1) if count % n == 0 and fits(n)), default=1)

    rows = largest(height, lambda n: (n + 2) * row <= BUDGET)
    together = largest(images, lambda n: n * (rows + 2) * row <= BUDGET) if rows == height else 1
    return Blocks(together, rows)


def cost(shape: tuple[int, ...], out: int, itemsize: int) -> pl.CostEstimate:
    """What one call does to `[B, H, W, C]`: of each pixel two operations of the norm, five of SiLU and 18 of the
    depthwise convolution a channel, and 2 O of the product; memory as the blocks read and write it.

    Args:
        shape: of x.
        out: O.
        itemsize: bytes of a number of x.
    """
    images, height, width, channels = shape
    taken = blocks(shape)
    halo = 1 if taken.rows == height else (taken.rows + 2) / taken.rows  # rows that are read and activated again
    pixels = images * height * width
    activated = round(pixels * halo) * channels
    weights = itemsize * channels * out + 4 * 10 * channels
    return pl.CostEstimate(
        flops=7 * activated + pixels * channels * (18 + 2 * out),
        transcendentals=activated,
        bytes_accessed=itemsize * (activated + pixels * out) + weights + 4 * images * (3 * channels + out),
    )


def _on_a_device(
    x: jax.Array,
    norm: Norm,
    kernel: jax.Array,
    depthwise_bias: jax.Array,
    weights: jax.Array,
    offset: jax.Array,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas import tpu as pltpu  # imports Mosaic, which only TPUs need

    images, height, width, channels = x.shape
    out = weights.shape[-1]
    taken = blocks(x.shape)
    strips = height // taken.rows
    block = (taken.images, taken.rows, width, channels)
    edge = (taken.images, 1, width, channels)
    in_specs = [
        pl.BlockSpec(block, lambda b, i: (b, i, 0, 0)),
        # The row above and the row below, of which the first and the last strip have none; theirs are not used.
        pl.BlockSpec(edge, lambda b, i: (b, jnp.maximum(i * taken.rows - 1, 0), 0, 0)),
        pl.BlockSpec(edge, lambda b, i: (b, jnp.minimum((i + 1) * taken.rows, height - 1), 0, 0)),
        pl.BlockSpec((taken.images, 3, channels), lambda b, i: (b, 0, 0)),
        pl.BlockSpec((10, channels), lambda b, i: (0, 0)),
        pl.BlockSpec((channels, out), lambda b, i: (0, 0)),
        pl.BlockSpec((taken.images, 1, out), lambda b, i: (b, 0, 0)),
    ]
    if strips == 1:  # nothing is above or below
        del in_specs[1:3]
    taps = jnp.concatenate([kernel.reshape(9, channels), depthwise_bias[None]]).astype(jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, strips=strips),
        grid=(images // taken.images, strips),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((taken.images, taken.rows, width, out), lambda b, i: (b, i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((images, height, width, out), x.dtype),
        cost_estimate=cost(x.shape, out, x.dtype.itemsize),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="fused_separable",
    )
    return call(
        *([x] if strips == 1 else [x, x, x]),
        jnp.stack(norm, axis=1),
        taps,
        weights[0, 0].astype(x.dtype),
        offset.astype(jnp.float32)[:, None],
    )


def _kernel(x_ref: Any, *refs: Any, strips: int) -> None:
    """One block: rows of images in, the same rows of the result out."""
    *edges, norm_ref, taps_ref, weights_ref, offset_ref, out_ref = refs
    images, rows, width, channels = x_ref.shape
    norm, taps = norm_ref[...], taps_ref[...]
    mean, gain, bias = (norm[:, part][:, None, None, :] for part in range(3))

    def activated(ref: Any) -> jax.Array:
        h = (ref[...].astype(jnp.float32) - mean) * gain + bias
        return h * jax.nn.sigmoid(h)

    if edges:
        above, below = (activated(ref) for ref in edges)
        strip = pl.program_id(1)
        above = jnp.where(strip == 0, 0.0, above)
        below = jnp.where(strip == strips - 1, 0.0, below)
    else:
        above = below = jnp.zeros((images, 1, width, channels), jnp.float32)
    h = jnp.concatenate([above, activated(x_ref), below], axis=1)  # [images, rows + 2, W, C]
    nothing = jnp.zeros((images, rows + 2, 1, channels), jnp.float32)
    columns = (
        jnp.concatenate([nothing, h[:, :, :-1]], axis=2),
        h,
        jnp.concatenate([h[:, :, 1:], nothing], axis=2),
    )
    total = taps[9]
    for row in range(3):
        for column in range(3):
            total = total + columns[column][:, row : row + rows] * taps[3 * row + column]
    flat = total.reshape(images * rows * width, channels).astype(weights_ref.dtype)
    y = jnp.dot(flat, weights_ref[...], preferred_element_type=jnp.float32)
    y = y.reshape(images, rows, width, y.shape[-1]) + offset_ref[...][:, :, None, :]
    out_ref[...] = y.astype(out_ref.dtype)
