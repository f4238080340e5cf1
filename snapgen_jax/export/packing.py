"""Writes packed files: weights of few levels in about as many bits as their levels are worth.

A packed file of a bundle also holds its skeleton: all bytes of a `.tflite` file but those that are made of its packed
weights. docs/packing.md describes the format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import IO, Any

import numpy as np

from snapgen_jax.export.digits import PackedError, encode, levels, stored_bytes
from snapgen_jax.export.unpacking import CHUNK, DTYPES, MAGIC, PREFIX, VERSION, Fill, PackedFile
from snapgen_jax.training.exports import Stored


@dataclasses.dataclass(frozen=True)
class Filling:
    """A hole of a file: `bytes` from `offset` on are made of the weight `name`; see `unpacking.Hole`."""

    offset: int
    bytes: int
    fill: Fill
    name: str


@dataclasses.dataclass(frozen=True)
class Original:
    """The file that a packed one expands to, and which of its bytes are made of weights.

    Attributes:
        path: of the file.
        fillings: its holes, in any order.
        axes: {name: the order in which the file has the axes of a weight}; as they are where there is none.
    """

    path: pathlib.Path
    fillings: Sequence[Filling]
    axes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def write_packed(
    path: str | pathlib.Path,
    weights: Mapping[str, Stored],
    others: Mapping[str, np.ndarray] = MappingProxyType({}),
    original: Original | None = None,
) -> pathlib.Path:
    """Writes a packed file under another name, and moves it when it is whole.

    Args:
        path: the file.
        weights: those of few levels, whose scales are stored as float32.
        others: arrays that are stored as they are; float64 and bfloat16 have no place.
        original: the file that it expands to.

    Returns:
        `path`.

    Raises:
        PackedError: an integer is not among the levels of its bits, an array is of another dtype, or what was written
            does not expand to the original.
    """
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial.", dir=path.parent)
    partial = pathlib.Path(name)
    try:
        with open(handle, "wb") as file, tempfile.TemporaryFile(dir=path.parent) as body:
            header = _write_body(body, weights, others, original)
            compressed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
            size = PREFIX.size + len(compressed) + body.tell()
            file.write(PREFIX.pack(MAGIC, VERSION, len(compressed), zlib.crc32(compressed), size) + compressed)
            body.seek(0)
            while chunk := body.read(CHUNK):
                file.write(chunk)
        partial.chmod(0o644)
        if original is not None:
            _try(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _try(partial: pathlib.Path) -> None:
    """Raises `PackedError` where a file does not expand to its original."""
    with tempfile.TemporaryDirectory(dir=partial.parent) as scratch, PackedFile(partial) as packed:
        packed.expand(pathlib.Path(scratch) / "expanded")


def _write_body(
    body: IO[bytes], weights: Mapping[str, Stored], others: Mapping[str, np.ndarray], original: Original | None
) -> dict[str, Any]:
    """Writes all sections; returns the header."""

    def section(chunks: Iterable[bytes]) -> list[int]:
        offset, crc32 = body.tell(), 0
        for chunk in chunks:
            body.write(chunk)
            crc32 = zlib.crc32(chunk, crc32)
        return [offset, body.tell() - offset, crc32]

    header: dict[str, Any] = {"weights": [], "arrays": []}
    for name, stored in weights.items():
        axes = tuple(range(stored.integers.ndim)) if original is None else original.axes.get(name)
        header["weights"].append(_write_weight(name, stored, axes, section))
    for name, array in others.items():
        if str(array.dtype) not in DTYPES:
            raise PackedError(f"{name!r} is {array.dtype}; arrays of {', '.join(DTYPES)} can be stored")
        data = section([np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()])
        header["arrays"].append({"name": name, "shape": list(array.shape), "dtype": str(array.dtype), "data": data})
    if original is not None:
        index = {name: i for i, name in enumerate(weights)}
        fillings = sorted(original.fillings, key=lambda filling: filling.offset)
        with original.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        header["expanded"] = {
            "bytes": original.path.stat().st_size,
            "sha256": digest,
            "skeleton": section(_deflated(_around(original.path, fillings))),
            "holes": [[filling.offset, filling.fill, index[filling.name]] for filling in fillings],
        }
    return header


def _write_weight(name: str, stored: Stored, axes: tuple[int, ...] | None, section: Any) -> dict[str, Any]:
    """Writes a weight in a file's order of axes; returns its entry of the header."""
    integers = np.asarray(stored.integers)
    axes = tuple(range(integers.ndim)) if axes is None else axes
    scale = np.asarray(stored.scale, "<f4")
    scale = scale.reshape((1,) * (integers.ndim - scale.ndim) + scale.shape).transpose(axes)
    try:
        data = section([encode(integers.transpose(axes), stored.bits)])
    except PackedError as error:
        raise PackedError(f"{name!r}: {error}") from error
    entry = {
        "name": name,
        "shape": [integers.shape[axis] for axis in axes],
        "bits": int(stored.bits),
        "data": data,
        "scale_shape": list(scale.shape),
        "scale": section([scale.tobytes()]),
    }
    back = [int(axis) for axis in np.argsort(axes)]
    return entry if back == list(range(len(back))) else {**entry, "axes": back}


def _around(path: pathlib.Path, fillings: Sequence[Filling]) -> Iterator[bytes]:
    """The bytes of a file outside of its holes."""
    with path.open("rb") as file:
        place = 0
        for filling in [*fillings, Filling(path.stat().st_size, 0, "int8", "")]:
            file.seek(place)
            left = filling.offset - place
            while left > 0:
                chunk = file.read(min(left, CHUNK))
                left -= len(chunk)
                yield chunk
            place = filling.offset + filling.bytes


def _deflated(chunks: Iterable[bytes]) -> Iterator[bytes]:
    stream = zlib.compressobj(9)
    for chunk in chunks:
        yield stream.compress(chunk)
    yield stream.flush()


# --- sizes, from shapes and bits alone --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a packed file takes, in bytes, without its header and without a skeleton.

    Attributes:
        weights: the packed integers.
        scales: float32.
        others: what is stored as it is.
        float16: the same parameters in float16, two bytes each.
        count: how many packed weights there are.
        information: of the integers by the count of the paper, sum N_i log2(levels_i) / 8.
    """

    weights: int
    scales: int
    others: int
    float16: int
    count: int
    information: float

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.scales + self.others

    @property
    def bits(self) -> float:
        """Stored bits for each packed weight."""
        return 8 * self.weights / max(self.count, 1)

    @property
    def ratio(self) -> float:
        """How many times as large float16 is."""
        return self.float16 / max(self.total, 1)


def sizes(weights: Iterable[tuple[Sequence[int], int, int]], others: Iterable[tuple[Sequence[int], int]]) -> Sizes:
    """The size of a packed file.

    Args:
        weights: (shape, number of scales, bits) of each weight of few levels.
        others: (shape, bytes of a number) of each other parameter.

    Returns:
        Of each weight ceil(ceil(N / n) k / 8) bytes, (n, k) = `group(bits)`, and 4 for each scale. A file has some
        bytes more: its header, about 50 for each weight.
    """
    held, kept = list(weights), list(others)
    count = sum(math.prod(shape) for shape, _, _ in held)
    return Sizes(
        weights=sum(stored_bytes(math.prod(shape), bits) for shape, _, bits in held),
        scales=sum(4 * scales for _, scales, _ in held),
        others=sum(width * math.prod(shape) for shape, width in kept),
        float16=2 * (count + sum(math.prod(shape) for shape, _ in kept)),
        count=count,
        information=sum(math.prod(shape) * math.log2(levels(bits)) for shape, _, bits in held) / 8,
    )
