"""Depthwise 3x3 convolution in two equal forms.

`grouped` is XLA's grouped convolution: right on TPU and GPU, and what an export must hold. On CPU XLA runs it about a
hundred times slower than it should, so there `shifted` adds up nine shifted products instead.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Form = Literal["auto", "grouped", "shifted"]


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


@jax.jit(static_argnames="stride")
def depthwise_shifted(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The same convolution as nine shifted multiply-adds; arguments and result as in `depthwise_grouped`."""
    _, h, w, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    terms = [padded[:, i : i + h : stride, j : j + w : stride, :] * kernel[i, j, 0] for i in range(3) for j in range(3)]
    return sum(terms[1:], terms[0])


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1, form: Form = "auto") -> jax.Array:
    """Depthwise 3x3 convolution in the given form; "auto" is the grouped one. Shapes as in `depthwise_grouped`."""
    return depthwise_shifted(x, kernel, stride) if form == "shifted" else depthwise_grouped(x, kernel, stride)


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
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (3, 3, 1, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.stride, self.form, self.dtype = stride, form, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = depthwise(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride, self.form)
        return y + self.bias[...].astype(self.dtype)
