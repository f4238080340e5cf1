"""Matrix products in eight bits: of int8, or of the floating-point format e4m3 (Micikevicius et al. 2022, arXiv
2209.05433).

    y[t, n] = r_t s_n  sum_k X[t, k] W[k, n],     X = round(x / r),   W = round(w / s)
    r_t = max_k |x[t, k]| / M,   s_n = max_k |w[k, n]| / M            M = 127 of int8, 448 of e4m3

A token has a scale of its own, taken as it comes, and so has an output channel, stored beside the kernel (Dettmers et
al. 2022, arXiv 2208.07339, section 3.1). Sums are of int32, or float32 of e4m3, and the scales are applied after them.
A TPU v5e, v5p or v6e multiplies int8 twice as fast as bfloat16, and an NVIDIA GPU from Hopper on both formats.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Format = Literal["int8", "fp8"]
SCALE = "kernel_scale"  # the name of a kernel's scales, beside "kernel"
DTYPES: dict[Format, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def quantise(x: jax.Array, axis: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """`x` as `values * scales`.

    Args:
        x: of any shape and floating-point dtype.
        axis: along which one scale is shared.
        dtype: of the values, one of `DTYPES`.

    Returns:
        values: in the shape of x; the largest of each scale is 127, or 448.
        scales: float32, 1 along `axis`; 1 where all values are zero.
    """
    x, integer = x.astype(jnp.float32), jnp.issubdtype(dtype, jnp.integer)
    largest = jnp.iinfo(dtype).max if integer else float(jnp.finfo(dtype).max)
    reach = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scales = jnp.where(reach == 0, 1, reach / largest)
    values = jnp.clip(x / scales, -largest, largest)
    return (jnp.round(values) if integer else values).astype(dtype), scales


def quantise_kernel(kernel: jax.Array, form: Format) -> tuple[jax.Array, jax.Array]:
    """A kernel `[..., in, out]` in eight bits, and its scales `[..., out]` float32."""
    values, scales = quantise(kernel, -2, DTYPES[form])
    return values, jnp.squeeze(scales, -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def product(x: jax.Array, kernel: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`[..., in]` by `[in, out]`, in `dtype`. The rounding of x counts as the identity in its derivative; the kernel,
    which is frozen, has none.

    Args:
        x: of any floating-point dtype.
        kernel: of `quantise_kernel`.
        scale: its scales, `[out]` float32.
        dtype: of the result.
    """
    rows, row_scale = quantise(x, -1, kernel.dtype)
    sums = jnp.int32 if jnp.issubdtype(kernel.dtype, jnp.integer) else jnp.float32
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(rows, kernel, contracted, preferred_element_type=sums)
    return (y.astype(jnp.float32) * row_scale * scale).astype(dtype)


@product.defjvp
def _product_jvp(dtype: DTypeLike, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, kernel, scale = primals
    dx = tangents[0].astype(dtype)
    dy = jnp.dot(dx, kernel.astype(dtype)) * jax.lax.stop_gradient(scale).astype(dtype)
    return product(x, kernel, scale, dtype), dy
