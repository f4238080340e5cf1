"""Weights that were trained to take few values, in a file of eight-bit weights: exact, with their own scales.

The quantiser of precision.py gives every channel the scale max|w| / 127, in which a weight of levels s q, such as
s {-1, 0, 1}, is rounded once more. Here its integers and its scales are put in their place; both have as many bytes, so
that the graph stays as it is. Where an operator takes no integers, as a depthwise convolution, the floats s q stay.

A converter renames weights and turns their axes, so they are found by their numbers.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from snapgen_jax.export.flatbuffer import Constant, constants
from snapgen_jax.export.packing import Filling
from snapgen_jax.export.storage import TOLERANCE
from snapgen_jax.export.unpacking import Fill
from snapgen_jax.training.exports import Stored

INT8 = 127


@dataclasses.dataclass(frozen=True)
class Kept:
    """What of a file is made of weights of few levels.

    Attributes:
        fillings: bytes that are made of them.
        axes: {weight: the order in which the file has its axes}, of those that the file holds.
        missing: the other weights: a converter has changed them, or eight bits with a scale a channel cannot be theirs.
            They are rounded like any other.
    """

    fillings: tuple[Filling, ...]
    axes: Mapping[str, tuple[int, ...]]
    missing: tuple[str, ...]


def keep_levels(source: str | pathlib.Path, target: str | pathlib.Path, storage: Mapping[str, Stored]) -> Kept:
    """Puts integers and scales of weights in place of what the quantiser made of them.

    Args:
        source: the float32 file.
        target: what `precision.quantise` made of it, which is changed in place.
        storage: the weights, see `ExportUnit`.
    """
    fillings: dict[int, Filling] = {}
    axes: dict[str, tuple[int, ...]] = {}
    made = {(constant.graph, constant.name): constant for constant in constants(target)}
    data = np.memmap(target, np.uint8, "r+")
    for name, order, found in _matches(source, storage):
        constant, integers = made.get((found.graph, found.name)), storage[name].integers.transpose(order)
        scale = _of_rank(storage[name]).transpose(order)
        if constant is None or axes.get(name, order) != order:
            continue
        fill: Fill = "float32" if constant.dtype == "float32" else "int8"
        if fill == "int8":
            if constant.dtype != "int8" or not _fits(integers, scale, constant):
                continue
            every = np.broadcast_to(scale.reshape(-1), constant.scales).astype("<f4")
            _put(data, constant.scale_offset, every)
            if scale.size == every.size:
                fillings[constant.scale_offset] = Filling(constant.scale_offset, every.nbytes, "scale", name)
        _put(data, constant.offset, integers.astype(np.int8) if fill == "int8" else _product(integers, scale))
        fillings[constant.offset] = Filling(constant.offset, constant.bytes, fill, name)
        axes[name] = order
    data.flush()
    return Kept(tuple(fillings.values()), axes, tuple(name for name in storage if name not in axes))


def _matches(
    source: str | pathlib.Path, storage: Mapping[str, Stored]
) -> Iterator[tuple[str, tuple[int, ...], Constant]]:
    """Each weight with each constant of a float32 file that holds its numbers, and the order of axes that it has there.

    The number of weights that are not zero is the same in any order, and sorts out most pairs. Of equal weights each
    gets a constant of its own, where there are as many.
    """
    by_count = collections.defaultdict(list)
    for name, stored in storage.items():
        if stored.integers.size > 1:
            by_count[stored.integers.size, _nonzero(stored)].append(name)
    data, seen = np.memmap(source, np.uint8, "r"), set()
    for constant in constants(source):
        if constant.dtype != "float32":
            continue
        numbers = data[constant.offset :][: constant.bytes].view("<f4")
        candidates = by_count.get((numbers.size, int(np.count_nonzero(numbers))), ())
        for name in sorted(candidates, key=lambda name: name in seen):
            if (order := _order(storage[name], numbers.reshape(constant.shape))) is not None:
                seen.add(name)
                yield name, order, constant
                break


def _order(stored: Stored, numbers: np.ndarray) -> tuple[int, ...] | None:
    """The order of axes in which a weight has these numbers; None where it has them in none."""
    scale, long = _of_rank(stored), [n for n in numbers.shape if n > 1]
    for order in itertools.permutations(range(stored.integers.ndim)):
        integers = stored.integers.transpose(order)
        if [n for n in integers.shape if n > 1] != long:
            continue
        flat, few = numbers.reshape(-1), math.prod(integers.shape[1:])
        first, factor = integers[:1], np.broadcast_to(scale.transpose(order), integers.shape)
        if _close(_product(first, factor[:1]), flat[:few]) and _close(_product(integers, factor), flat):
            return order
    return None


def _close(product: np.ndarray, numbers: np.ndarray) -> bool:
    return np.allclose(product.reshape(-1), numbers, rtol=TOLERANCE, atol=0)


def _fits(integers: np.ndarray, scale: np.ndarray, constant: Constant) -> bool:
    """Whether a constant of eight bits can hold a weight in this order of axes: no integer is beyond 127, and the scale
    is one for all, or one for each channel of the constant."""
    if integers.size and max(-int(integers.min()), int(integers.max())) > INT8:
        return False
    axes = [axis for axis, n in enumerate(scale.shape) if n > 1]
    if not axes:
        return True
    before = math.prod(integers.shape[: axes[0]]) == math.prod(constant.shape[: constant.channel])
    return len(axes) == 1 and before and scale.size == constant.scales


def _of_rank(stored: Stored) -> np.ndarray:
    """The scale, float32, with as many axes as the weight."""
    scale = np.asarray(stored.scale, np.float32)
    return scale.reshape((1,) * (stored.integers.ndim - scale.ndim) + scale.shape)


def _product(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight, float32 in C order."""
    return np.multiply(integers, scale, dtype=np.float32, casting="unsafe", order="C")


def _nonzero(stored: Stored) -> int:
    return int(np.count_nonzero(_product(stored.integers, _of_rank(stored))))


def _put(data: np.ndarray, offset: int, numbers: np.ndarray) -> None:
    raw = np.frombuffer(np.ascontiguousarray(numbers).tobytes(), np.uint8)
    data[offset : offset + raw.size] = raw
