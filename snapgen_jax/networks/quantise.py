"""Weights of few values: w = s q, with integers q of b bits and a scale s for each output channel.

    q = clip(round(w / s), low, high)            balanced    low, high = -2^(b-1), 2^(b-1)        2^b + 1 levels
                                                 unbalanced  low, high = -2^(b-1), 2^(b-1) - 1    2^b levels

The balanced set is that of BitsFusion (Sui et al. 2024, arXiv 2406.04333, section 4.1): the weights of a denoiser lie
evenly around zero, and one more level lets theirs do so too. Eight bits are -127..127, which every int8 kernel knows.
Scales begin so that the levels reach from the smallest weight to the largest, and then weights and scale are fitted to
each other in turn (section 4.2). Both are trained, by the straight-through gradient of LSQ (Esser et al. 2020, arXiv
1902.08153, equations 3 to 5).

    layers = quantisable(config)                       # {"mid/block_00/conv_1": Layer}
    bits = bits_of(layers, {}, default=2)              # {"mid/block_00/conv_1": 2}
    scales = first_scales(params, bits)
    used = quantised(params, scales, bits)             # the tree that the network is applied to
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from snapgen_jax.networks.module import NetworkConfig, Path, build, flatten, unflatten
from snapgen_jax.networks.time_cache import depends_on_time_alone

Tree = Any
Levels = Literal["balanced", "unbalanced"]
EIGHT = 8  # of depthwise kernels and of the first and the last layer
MOST = 8
KERNEL = "kernel"
FIRST_AND_LAST = ("conv_in", "conv_out", "patch", "out")
ROUNDS = 10  # of the alternating initialisation
SMALLEST = 1e-12  # of a scale


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution whose kernel may be quantised.

    Attributes:
        shape: of the kernel; the last axis is that of the outputs.
        fixed: its bits, where these are not for choice; else None.
    """

    shape: tuple[int, ...]
    fixed: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def scales(self) -> int:
        """Number of scales."""
        return math.prod(scale_shape(self.shape))


def kernel_path(name: str) -> Path:
    """Where the kernel of a layer "mid/block_00/conv_1" lies in the parameter tree."""
    return (*name.split("/"), KERNEL)


def quantisable(config: NetworkConfig) -> dict[str, Layer]:
    """`{name: Layer}` of a network: all linear layers and convolutions, but for those that know the time alone, whose
    results a time cache holds (see `networks/time_cache.py`)."""
    found = {}
    for path, leaf in flatten(build(config)[1]).items():
        if path[-1] != KERNEL or leaf.ndim < 2 or depends_on_time_alone(config, path):
            continue
        depthwise = leaf.ndim == 4 and leaf.shape[2] == 1
        fixed = EIGHT if depthwise or path[0] in FIRST_AND_LAST else None
        found["/".join(path[:-1])] = Layer(tuple(leaf.shape), fixed)
    return found


def bits_of(layers: Mapping[str, Layer], chosen: Mapping[str, int], default: int) -> dict[str, int]:
    """`{name: bits}` of all layers.

    Args:
        layers: of `quantisable`.
        chosen: bits of layers, fixed ones too, by name or by a pattern such as "*/ffn/*" (see `fnmatch`); of several
            that fit a layer the last counts.
        default: bits of the others, but for those that are fixed.

    Raises:
        ValueError: an entry fits no layer, or a number of bits is not from 1 to 8.
    """
    found = {name: layer.fixed or default for name, layer in layers.items()}
    for pattern, bits in chosen.items():
        if not 1 <= bits <= MOST:
            raise ValueError(f"bits: {pattern!r} has {bits}; give from 1 to {MOST}")
        fitting = [pattern] if pattern in layers else fnmatch.filter(layers, pattern)
        if not fitting:
            close = difflib.get_close_matches(pattern, layers, n=1)
            raise ValueError(
                f"bits: {pattern!r} is no layer whose weights can be quantised; "
                + (f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(layers)[:8])} ...")
            )
        found |= dict.fromkeys(fitting, bits)
    return found


def average_bits(layers: Mapping[str, Layer], bits: Mapping[str, int]) -> float:
    """Mean of log2 of the number of balanced levels, over the weights of all layers that have bits."""
    sizes = {name: layers[name].size for name in bits}
    return sum(math.log2(level_count(b)) * sizes[name] for name, b in bits.items()) / sum(sizes.values())


def level_range(bits: int, levels: Levels = "balanced") -> tuple[int, int]:
    """(low, high): the smallest and the largest integer of b bits."""
    if bits == EIGHT:
        return -127, 127
    half = 2 ** (bits - 1)
    return -half, half if levels == "balanced" else half - 1


def level_count(bits: int, levels: Levels = "balanced") -> int:
    """Number of integers of b bits."""
    low, high = level_range(bits, levels)
    return high - low + 1


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a kernel: `[out]`, or `[L, 1, out]` of a stack of L linear layers. It broadcasts to the
    kernel."""
    return (shape[0], 1, shape[2]) if len(shape) == 3 else shape[-1:]


# --- the quantiser ----------------------------------------------------------------------------------------------------


def integers(w: jax.Array, scale: jax.Array, low: Any, high: Any) -> jax.Array:
    """q, float32 in the shape of w."""
    return jnp.clip(jnp.round(w / scale), low, high)


@jax.custom_vjp
def fake_quantised(w: jax.Array, scale: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """s q, in the shape of w; low and high may be traced, so that one program serves every number of bits.

    Of its gradients, that of w is the identity where w / s lies between low and high, and zero beyond. That of s is
    q - w / s between, and q beyond, times 1 / sqrt(N high), N being the weights of a scale (LSQ, section 2.2).
    """
    return integers(w, scale, low, high) * scale


def _forward(w: jax.Array, scale: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, Any]:
    return fake_quantised(w, scale, low, high), (w, scale, low, high)


def _backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    w, scale, low, high = kept
    ratio = w / scale
    inside = (low <= ratio) & (ratio <= high)
    by_scale = gradient * (jnp.clip(jnp.round(ratio), low, high) - jnp.where(inside, ratio, 0))
    factor = 1 / jnp.sqrt(jnp.maximum(high, 1) * (w.size / scale.size))
    return jnp.where(inside, gradient, 0), factor * _summed(by_scale, scale.shape), jnp.zeros(()), jnp.zeros(())


fake_quantised.defvjp(_forward, _backward)


def _summed(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x, summed over the axes along which an array of the given shape broadcasts to it."""
    full = (1,) * (x.ndim - len(shape)) + tuple(shape)
    axes = tuple(axis for axis, n in enumerate(full) if n == 1 and x.shape[axis] != 1)
    return jnp.sum(x, axis=axes, keepdims=True).reshape(shape)


def positive(scale: jax.Array) -> jax.Array:
    """The scale that is used of one that is trained: its absolute value, and never zero."""
    return jnp.maximum(jnp.abs(scale), SMALLEST)


# --- first scales -----------------------------------------------------------------------------------------------------


def min_max_scale(w: jax.Array, low: Any, high: Any) -> jax.Array:
    """s of the shape `scale_shape`, at which the levels are as far apart as the smallest and the largest weight. A
    channel of zeros gets the scale of one that was drawn anew."""
    shape = scale_shape(w.shape)
    axes = tuple(range(w.ndim - 1)) if len(shape) == 1 else (1,)
    reach = (jnp.max(w, axis=axes) - jnp.min(w, axis=axes)).reshape(shape)
    return jnp.where(reach > 0, reach / (high - low), math.sqrt(math.prod(shape) / w.size))


def alternating_scale(w: jax.Array, scale: jax.Array, low: Any, high: Any, rounds: int = ROUNDS) -> jax.Array:
    """s after so many rounds of q = integers(w, s), s = <w, q> / <q, q>. The squared error does not rise from round to
    round. Where all q are zero, s is too large and is halved."""
    return jax.lax.fori_loop(0, rounds, lambda _, s: _fitted(w, s, low, high), scale)


def _fitted(w: jax.Array, scale: jax.Array, low: Any, high: Any) -> jax.Array:
    q = integers(w, scale, low, high)
    squares, product = _summed(q * q, scale.shape), _summed(w * q, scale.shape)
    return jnp.where(squares > 0, product / jnp.maximum(squares, 1), scale / 2)


# --- networks ---------------------------------------------------------------------------------------------------------


def scale_name(bits: int) -> str:
    """The name of a layer's scales in their tree. It has the bits in it, so that scales of other bits are refused."""
    return f"b{bits}_scale"


def first_scales(
    params: Tree, bits: Mapping[str, int], levels: Levels = "balanced", rounds: int = ROUNDS
) -> dict[str, Any]:
    """`{... {"b2_scale": s}}`, the scales with which training begins, float32 of the shape `scale_shape`.

    Args:
        params: of the network.
        bits: `{name: bits}`.
        levels: see the top of this file.
        rounds: of the alternating fit; 0 leaves the scales that reach from the smallest to the largest weight.
    """
    flat = flatten(params)
    kernels = [flat[kernel_path(name)] for name in bits]
    scales = _first(kernels, tuple(level_range(b, levels) for b in bits.values()), rounds)
    paths = ((*name.split("/"), scale_name(b)) for name, b in bits.items())
    return unflatten(dict(zip(paths, scales, strict=True)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first(kernels: list[jax.Array], ranges: tuple[tuple[int, int], ...], rounds: int) -> list[jax.Array]:
    """Scales of all kernels, in one loop: a loop for each takes long to compile."""
    kernels = [w.astype(jnp.float32) for w in kernels]

    def fit(_: int, scales: list[jax.Array]) -> list[jax.Array]:
        return [_fitted(w, s, *bounds) for w, s, bounds in zip(kernels, scales, ranges, strict=True)]

    begun = [min_max_scale(w, *bounds) for w, bounds in zip(kernels, ranges, strict=True)]
    return jax.lax.fori_loop(0, rounds, fit, begun)


def quantised(params: Tree, scales: Tree, bits: Mapping[str, int], levels: Levels = "balanced") -> Tree:
    """The parameters that the network is applied to: kernels that have bits are s q, float32; all else is as it is.

    Args:
        params: of the network, as they are trained.
        scales: as from `first_scales`, of the same bits.
        bits: `{name: bits}`, static.
        levels: see the top of this file.
    """
    flat, flat_scales = dict(flatten(params)), flatten(scales)
    for name, b in bits.items():
        path = kernel_path(name)
        scale = positive(flat_scales[*path[:-1], scale_name(b)])
        low, high = (jnp.float32(bound) for bound in level_range(b, levels))
        flat[path] = fake_quantised(flat[path].astype(jnp.float32), scale, low, high)
    return unflatten(flat)


def stored_integers(
    used: Tree, scales: Tree, bits: Mapping[str, int], levels: Levels = "balanced"
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """`{name: (q int8 in the shape of the kernel, s)}` of which `used`, as from `quantised`, is the product."""
    flat, flat_scales, found = flatten(used), flatten(scales), {}
    for name, b in bits.items():
        path = kernel_path(name)
        scale = positive(flat_scales[*path[:-1], scale_name(b)])
        found[name] = integers(flat[path], scale, *level_range(b, levels)).astype(jnp.int8), scale
    return found
