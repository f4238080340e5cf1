"""Depthwise 3x3 convolution in three equal forms.

`grouped` is XLA's grouped convolution: right on TPU, and what an export must hold. On CPU XLA runs it about a hundred
times slower than it should, so there `shifted` adds up nine shifted products instead, and brings its own rule for the
gradient: autodiff of the sums would reduce over shifted slices, which XLA does not vectorise on CPU.
`benchmarks/depthwise.py` measures both.

`flipped`, for GPUs, is the grouped convolution with a rule for its gradient: that of the image is a grouped convolution
too, by the flipped kernel. Derived by autodiff, a layer alone took 9.8 ms forward and backward on an H200 (batch 256,
32 x 32, 512 channels, bfloat16; jax 0.11), and 0.97 ms by this rule, with the gradient of the kernel as autodiff has
it: sums of slices in its place took 1.5 ms, and nine shifted products throughout 3.7. In the 379M UNet's whole step the
two took the same time, 85 ms: there XLA found the fast way by itself.

The shifted form reads images as rows, `[B, H, W*C]`, so that a shift by one column is an offset of C in one long
contiguous axis. With a stride of two the columns are taken in pairs, `[B, H, W/2 * 2C]`: one product then serves two
neighbouring taps, one in each half of a pair.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from snapgen_jax.networks.layers import PRODUCT
from snapgen_jax.networks.module import draw

Form = Literal["auto", "grouped", "flipped", "shifted"]

# Floats of one running sum of the kernel gradient: few enough for all nine to stay in cache, and enough to be worth the
# start of a loop iteration.
SUM_SIZE = 8192


def depthwise_grouped(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Each channel convolved with its own 3x3 kernel, by `lax.conv_general_dilated`.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[3, 3, 1, C]`.
        stride: 1 or 2; the padding is one pixel on every side.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), C]`.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def depthwise_flipped(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`depthwise_grouped`, and its gradient as GPUs compute it fastest; arguments and result as there.

    It can be differentiated in reverse mode, any number of times.
    """
    return _flipped(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flipped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return depthwise_grouped(x, kernel, stride)


def _flipped_forward(x: jax.Array, kernel: jax.Array, stride: int):
    return _flipped(x, kernel, stride), (x, kernel)


def _flipped_backward(stride: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    if stride == 1:
        dx = depthwise_flipped(dy, kernel[::-1, ::-1])
    else:
        (dx,) = jax.linear_transpose(lambda x: depthwise_grouped(x, kernel, stride), x)(dy)
    (dkernel,) = jax.linear_transpose(lambda kernel: depthwise_grouped(x, kernel, stride), kernel)(dy)
    return dx, dkernel


_flipped.defvjp(_flipped_forward, _flipped_backward)


def _rows(x: jax.Array, stride: int) -> jax.Array:
    """The padded rows that the taps read: `[B, H, W, C] -> [B, s*(Ho - 1) + 3, (Wo + 2 // s) * s*C]`, s the stride."""
    b, h, w, c = x.shape
    height = stride * (-(-h // stride) - 1) + 3
    width = stride * (-(-w // stride) + 2 // stride)
    padded = jnp.pad(x, ((0, 0), (1, height - h - 1), (1, width - w - 1), (0, 0)))
    return padded.reshape(b, height, width * c)


def _taps(stride: int) -> list[tuple[int, int]]:
    """(row, column group) of the products that make up a convolution: nine, or with a stride of two six of two taps."""
    return [(i, group) for i in range(3) for group in range(2 // stride + 1)]


def shifted_sum(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The forward pass of `depthwise_shifted`, without its rule for the gradient. It sums in float32."""
    b, h, w, c = x.shape
    height, width, span = -(-h // stride), -(-w // stride), stride * c
    rows = _rows(x, stride)
    groups = 2 // stride + 1
    weights = jnp.pad(kernel[:, :, 0].astype(jnp.float32), ((0, 0), (0, groups * stride - 3), (0, 0)))
    weights = weights.reshape(3, groups, span)
    products = [
        rows[:, i : i + stride * (height - 1) + 1 : stride, g * span : (g + width) * span]
        * jnp.tile(weights[i, g], width)
        for i, g in _taps(stride)
    ]
    y = functools.reduce(jnp.add, products).reshape(b, height, width, stride, c)
    return functools.reduce(jnp.add, [y[..., half, :] for half in range(stride)]).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return shifted_sum(x, kernel, stride)


def _shifted_forward(x: jax.Array, kernel: jax.Array, stride: int):
    return _shifted(x, kernel, stride), (x, kernel)


def _shifted_backward(stride: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    if stride == 1:
        dx = shifted_sum(dy, kernel[::-1, ::-1], 1)
    else:
        (dx,) = jax.linear_transpose(lambda x: shifted_sum(x, kernel, stride), x)(dy)
    return dx, _kernel_gradient(x, dy, stride).astype(kernel.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(limit, 1))


def _kernel_gradient(x: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
    """Gradient of the kernel, `[3, 3, 1, C]` float32: running sums of x * dy, one a tap, over blocks of rows.

    A sum keeps the shape of a block until the end, so that every step is an elementwise product, which vectorises.
    """
    (b, height, width, c), span = dy.shape, stride * x.shape[-1]
    rows = _rows(x, stride)
    dy = jnp.tile(dy, (1, 1, 1, stride)).reshape(b, height, width * span)

    block = _largest_divisor(height, SUM_SIZE // (width * span))  # rows of dy
    images = _largest_divisor(b, SUM_SIZE // (block * width * span))  # more than one only where an image is small
    blocks = height // block

    def add_block(step: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        image, row, zero = jax.lax.div(step, blocks) * images, jax.lax.rem(step, blocks) * block, jnp.zeros_like(step)
        size = (images, stride * (block - 1) + 3, rows.shape[-1])
        x_block = jax.lax.dynamic_slice(rows, (image, row * stride, zero), size, allow_negative_indices=False)
        size = (images, block, width * span)
        dy_block = jax.lax.dynamic_slice(dy, (image, row, zero), size, allow_negative_indices=False)
        dy_block = dy_block.astype(jnp.float32)
        return [
            total + x_block[:, i : i + stride * (block - 1) + 1 : stride, g * span : (g + width) * span] * dy_block
            for total, (i, g) in zip(sums, _taps(stride), strict=True)
        ]

    zeros = [jnp.zeros((images, block, width * span), jnp.float32)] * len(_taps(stride))
    sums = jax.lax.fori_loop(0, b // images * blocks, add_block, zeros)
    ones = jnp.ones((1, images * block * width))  # a matrix product is a faster sum over rows than a reduction
    columns = jnp.stack([ones @ total.reshape(-1, span) for total in sums])  # [taps, 1, stride*C]
    return columns.reshape(3, -1, c)[:, :3].reshape(3, 3, 1, c)


@functools.partial(jax.jit, static_argnames="stride")  # its name is how `counting` knows the products in it
def depthwise_shifted(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The same convolution as a sum of shifted products; arguments and result as in `depthwise_grouped`.

    It sums in float32. It can be differentiated in reverse mode, any number of times.
    """
    return _shifted(x, kernel, stride)


_FORMS = {
    "auto": depthwise_grouped,
    "grouped": depthwise_grouped,
    "flipped": depthwise_flipped,
    "shifted": depthwise_shifted,
}


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1, form: Form = "auto") -> jax.Array:
    """Depthwise 3x3 convolution in the given form; "auto" is the grouped one. Shapes as in `depthwise_grouped`.

    Raises:
        ValueError: the stride is neither 1 nor 2.
    """
    if stride not in (1, 2):
        raise ValueError(f"depthwise: stride is {stride}; it must be 1 or 2")
    return _FORMS[form](x, kernel, stride)


class DepthwiseConv(nnx.Module):
    """Depthwise 3x3 convolution with a bias, `[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), C]`."""

    def __init__(
        self,
        width: int,
        *,
        stride: int = 1,
        form: Form = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = draw(rngs, nnx.initializers.lecun_normal(), (3, 3, 1, width))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.stride: int = stride
        self.form: Form = form
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = depthwise(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride, self.form)
        return checkpoint_name(y + self.bias[...].astype(self.dtype), PRODUCT)
