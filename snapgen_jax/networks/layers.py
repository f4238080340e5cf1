"""Layers that every network shares, written so that they compute well on TPU and convert to TFLite without loss.

All images are `[B, H, W, C]`. Parameters are float32; a layer computes in its `dtype`, and the norms take their
statistics in float32 whatever the dtype. No layer makes an array of more than four dimensions, because mobile GPU
delegates refuse them.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from snapgen_jax.networks import eight_bits
from snapgen_jax.networks.module import draw

Init = Literal["fan_in", "zeros"]
PRODUCT = "product"  # the name, for policies of `jax.checkpoint`, of what a matrix product or a convolution made


def _kernel(rngs: nnx.Rngs, shape: tuple[int, ...], init: Init) -> nnx.Param:
    return draw(rngs, nnx.initializers.zeros if init == "zeros" else nnx.initializers.lecun_normal(), shape)


def _constant(value: float, *shape: int) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32))


class Linear(nnx.Module):
    """Affine map of the last axis, `[..., in] -> [..., out]`.

    Attributes:
        kernel_scale: of a frozen network whose kernel is in eight bits, see `networks/eight_bit_network.py`; else None.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        bias: bool = True,
        init: Init = "fan_in",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = _kernel(rngs, (in_width, out_width), init)
        self.kernel_scale: nnx.Param | None = None
        self.bias = _constant(0, out_width) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kernel_scale is None:
            y = product(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        else:
            y = eight_bits.product(x, self.kernel[...], self.kernel_scale[...], self.dtype)
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(self.dtype), PRODUCT)


class Conv(nnx.Module):
    """Square convolution `[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out]`, padded by `size // 2`.

    The padding is written out, because "SAME" pads a stride of two on one side only and would disagree with every
    published checkpoint. `padding` gives other zeros (before, after) both axes.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        bias: bool = True,
        init: Init = "fan_in",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = _kernel(rngs, (size, size, in_width, out_width), init)
        self.bias = _constant(0, out_width) if bias else None
        self.stride, self.padding, self.dtype = stride, padding or (size // 2, size // 2), dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if kernel.shape[:2] == (1, 1) and self.stride == 1:
            y = pointwise(x, kernel)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=[self.padding] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return checkpoint_name(y if self.bias is None else y + self.bias[...].astype(self.dtype), PRODUCT)


@jax.custom_jvp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[..., in]` by `[in, out]`.

    The kernel's gradient is a product of two matrices. As a contraction over several axes at once, which it is
    otherwise, XLA computes on CPU all that led to the gradient of the output twice: for the input, and transposed for
    the kernel (`python -m benchmarks.update`: a tenth of the quickstart's update).
    """
    return jnp.dot(x, kernel)


@product.defjvp
def _product_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    return product(x, kernel), product(dx, kernel) + of_rows(x, dkernel)


def of_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`product`, on CPU with all axes but the last taken together."""

    def rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])

    return jax.lax.platform_dependent(x, kernel, cpu=rows, default=jnp.dot)


@jax.custom_jvp
def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution, `[B, H, W, in]` by `[1, 1, in, out]`, whose derivatives are matrix products.

    An exported network must hold a convolution here, and so the value is one. XLA derives the gradient of its kernel
    as a convolution of the images over the batch, which it does not recognise as a product, and which is slower on CPU.
    """
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pointwise.defjvp
def _pointwise_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    return pointwise(x, kernel), jnp.dot(dx, kernel[0, 0]) + of_rows(x, dkernel[0, 0])


SMALL = 2.0**-3  # what a norm squares is scaled by it


def mean_square(x: jax.Array) -> jax.Array:
    """`mean(x^2)` over the last axis, which stays with length 1; float32.

    What is squared is scaled by a power of two, which is exact: a phone's GPU may hold the squares in float16, which
    ends at 65504, and the activations of a transformer reach some hundreds.
    """
    return jnp.square(x * SMALL).mean(axis=-1, keepdims=True) * SMALL**-2


class GroupNorm(nnx.Module):
    """Group normalisation (Wu and He 2018, equations 1-3) of `[B, H, W, C]`.

    The statistics are taken of each channel first, and put together for its group: what has the size of the image keeps
    its channels in one axis. Split into groups they lie badly in memory; SnapGen's decoder took three times as long as
    TFLite for it.

    Two things are for phones, and exact here. A mean is taken of each row first: TFLite adds up what it means in one
    float32 number, and over an image of 1024 x 1024 that loses four digits. What is squared is scaled by a power of
    two, so that neither a square nor a sum of squares of a row passes float16's 65504.

    Raises:
        ValueError: `groups` does not divide `width`.
    """

    def __init__(self, width: int, groups: int = 32, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32):
        if width % groups:
            raise ValueError(
                f"GroupNorm: {groups} groups do not divide {width} channels; change `groups` or the widths"
            )
        self.scale, self.bias = _constant(1, width), _constant(0, width)
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y, _, gain, bias = self._parts(x)
        channels = (x.shape[0], 1, 1, x.shape[-1])
        return (y * gain.reshape(channels) + bias.reshape(channels)).astype(self.dtype)

    def coefficients(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`mean`, `gain` and `bias`, float32 `[B, C]`, of which the result is `(x - mean) * gain + bias`."""
        _, *found = self._parts(x)
        mean, gain, bias = (part.reshape(x.shape[0], x.shape[-1]) for part in found)
        return mean, gain, bias

    def _parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """x without the mean of each channel, that mean, and the gain and bias of each channel."""
        b, _, _, c = x.shape
        grouped, channels = (b, self.groups, c // self.groups), (b, 1, 1, c)
        y = x.astype(jnp.float32)
        of_channels = mean = y.mean(axis=2).mean(axis=1)
        y = y - mean.reshape(channels)
        variance = jnp.square(y * SMALL).mean(axis=2).mean(axis=1) * SMALL**-2
        variance, mean = variance.reshape(grouped), mean.reshape(grouped)
        mean = mean - mean.mean(axis=2, keepdims=True)  # of the channel, against its group
        variance = (variance + jnp.square(mean)).mean(axis=2, keepdims=True)
        gain = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...].reshape(grouped[1:])
        return y, of_channels, gain, mean * gain + self.bias[...].reshape(grouped[1:])


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al. 2016) of the last axis."""

    def __init__(self, width: int, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32):
        self.scale, self.bias = _constant(1, width), _constant(0, width)
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(mean_square(y) + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019, equation 4) of the last axis."""

    def __init__(self, width: int, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32):
        self.scale = _constant(1, width)
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(mean_square(y) + self.epsilon)
        return (y * self.scale[...]).astype(self.dtype)


class GEGLU(nnx.Module):
    """Gated feed-forward network `W_2 (a * gelu(b))` with `a, b = split(W_1 x)` (Shazeer 2020, equation 6).

    The GELU is the tanh approximation, one operator in TFLite, where the exact one becomes sixty-five; `exact` is for
    published weights that were trained with that.
    """

    def __init__(self, width: int, hidden: int, *, exact: bool = False, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.inner = Linear(width, 2 * hidden, dtype=dtype, rngs=rngs)
        self.outer = Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.exact = exact

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.inner(x), 2, axis=-1)
        return self.outer(value * jax.nn.gelu(gate, approximate=not self.exact))


def upsample_nearest(x: jax.Array, factor: int = 2) -> jax.Array:
    """`[B, H, W, C] -> [B, factor*H, factor*W, C]` by repetition: one operator in TFLite, where `repeat` is five.

    Its converters know that operator where height and width are equal. Elsewhere it would be two gathers, which no GPU
    delegate takes; two concatenations give the same.
    """
    b, h, w, c = x.shape
    if h != w:
        x = jnp.concatenate([x] * factor, axis=3).reshape(b, h, 1, factor * w * c)
        return jnp.concatenate([x] * factor, axis=2).reshape(b, factor * h, factor * w, c)
    return jax.image.resize(x, (b, factor * h, factor * w, c), method="nearest")
