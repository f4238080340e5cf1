"""Reads packed files: weights of few levels, in about as many bits as their levels are worth. Copied into every bundle.

docs/packing.md describes the format, so that it can be read in another language. packing.py writes it.

    with PackedFile("unet_int8.packed") as packed:
        integers, scale = packed.integers("net/conv/kernel"), packed.scale("net/conv/kernel")
        packed.expand("unet_int8.tflite")      # of a bundle: the file that LiteRT loads

Memory is bounded: a weight is read in blocks of some hundred thousand numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

if __package__:
    from snapgen_jax.export.digits import BLOCK, PackedError, decode, group, stored_bytes
else:  # beside its own copy, in a bundle
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent))
    from digits import BLOCK, PackedError, decode, group, stored_bytes  # type: ignore[import-not-found]

MAGIC = b"SNAPPACK"
VERSION = 1
PREFIX = struct.Struct("<8sIIIQ")  # magic, version, bytes of the header, its CRC-32, bytes of the whole file
DTYPES = ("float32", "float16", "int32", "int8", "uint8")
LARGEST_HEADER = 1 << 26
CHUNK = 1 << 20  # bytes that are read at a time

Fill = Literal["int8", "float32", "scale"]
Progress = Callable[[int, int], Any]
"""Is told the bytes that are written and those of the whole file; returns False to end the work."""

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A caller's `progress` returned False."""


@dataclasses.dataclass(frozen=True)
class Section:
    """Bytes of the file: `offset` from the end of the header, and their CRC-32."""

    offset: int
    bytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Levels:
    """A weight of few levels.

    Attributes:
        name: the path of the parameter.
        shape: in the order in which its integers are stored, the last axis fastest.
        bits: b.
        data: its digits.
        scale_shape: has the rank of `shape`, and 1 where the scale is repeated.
        scale: float32.
        axes: the parameter is the stored array with its axes in this order, `stored.transpose(axes)`.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    data: Section
    scale_shape: tuple[int, ...]
    scale: Section
    axes: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many integers."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Array:
    """Numbers that are stored as they are, little-endian."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: Section


@dataclasses.dataclass(frozen=True)
class Hole:
    """Where the expanded file has numbers that are made of a weight: at `offset`, as "int8" the integers, as "float32"
    each times its scale, or as "scale" the scales."""

    offset: int
    fill: Fill
    weight: Levels

    @property
    def bytes(self) -> int:
        """How many it has."""
        of = {"int8": self.weight.size, "float32": 4 * self.weight.size}
        return of.get(self.fill, self.weight.scale.bytes)


@dataclasses.dataclass(frozen=True)
class Expanded:
    """The file that a packed one expands to: its length, its checksum, its holes, and all else of it, deflated."""

    bytes: int
    sha256: str
    skeleton: Section
    holes: tuple[Hole, ...]


class PackedFile:
    """A packed file that is open for reading; closes with its `with` block.

    Attributes:
        weights: {name: Levels}.
        arrays: {name: Array}.
        expanded: None where it only holds weights.

    Raises:
        PackedError: this is no packed file, or it is damaged or of a newer format.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self._path, self._file = pathlib.Path(path), open(path, "rb")  # noqa: SIM115 (`close` closes it)
        try:
            self._begin = 0
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def integers(self, name: str) -> np.ndarray:
        """The integers of a weight, int8, in the shape of the parameter."""
        weight = self._weight(name)
        stored = np.concatenate([*self._blocks(weight), np.empty(0, np.int8)]).reshape(weight.shape)
        return stored.transpose(weight.axes)

    def scale(self, name: str) -> np.ndarray:
        """The scale of a weight, float32; broadcasts to the parameter."""
        weight = self._weight(name)
        return self._stored_scale(weight).transpose(weight.axes)

    def array(self, name: str) -> np.ndarray:
        """Numbers that are stored as they are."""
        if name not in self.arrays:
            raise PackedError(f"{self._path} has no array {name!r}; it has {_listed(self.arrays)}")
        array = self.arrays[name]
        data = b"".join(self._checked(array.data, name))
        return np.frombuffer(data, np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape)

    def expand(self, target: str | pathlib.Path, progress: Progress | None = None) -> pathlib.Path:
        """Writes the file that this one was made of, byte for byte.

        It is written under another name, compared with its checksum, and moved: it is whole or it is not there.

        Args:
            target: the file to write; its folder is there.
            progress: see `Progress`.

        Raises:
            PackedError: this file holds weights alone, or is damaged.
            Stopped: `progress` returned False.
        """
        if self.expanded is None:
            raise PackedError(f"{self._path} holds weights alone, and no file to expand to")
        target, digest, written = pathlib.Path(target), hashlib.sha256(), 0
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.partial.", dir=target.parent)
        partial = pathlib.Path(name)
        try:
            with open(handle, "wb") as file:
                for piece in self._pieces(self.expanded):
                    file.write(piece)
                    digest.update(piece)
                    written += len(piece)
                    if progress is not None and progress(written, self.expanded.bytes) is False:
                        raise Stopped(f"{target.name} was left at {written:,} of {self.expanded.bytes:,} bytes")
            if (written, digest.hexdigest()) != (self.expanded.bytes, self.expanded.sha256):
                raise self._damaged("what it expands to has another checksum than was noted")
            partial.chmod(0o644)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def _pieces(self, expanded: Expanded) -> Iterator[bytes]:
        """The expanded file in its order, a block at a time."""
        skeleton, place = _Inflated(self._checked(expanded.skeleton, "skeleton")), 0
        for hole in expanded.holes:
            yield from self._exactly(skeleton, hole.offset - place)
            yield from self._filled(hole)
            place = hole.offset + hole.bytes
        yield from self._exactly(skeleton, expanded.bytes - place)
        if skeleton.read(1):
            raise self._damaged("its skeleton is longer than the file that it belongs to")

    def _exactly(self, skeleton: _Inflated, count: int) -> Iterator[bytes]:
        while count:
            try:
                piece = skeleton.read(min(count, CHUNK))
            except zlib.error as error:
                raise self._damaged(f"its skeleton does not inflate: {error}") from error
            if not piece:
                raise self._damaged("its skeleton ends early")
            count -= len(piece)
            yield piece

    def _filled(self, hole: Hole) -> Iterator[bytes]:
        weight = hole.weight
        if hole.fill == "scale":
            yield self._stored_scale(weight).astype("<f4").tobytes()
            return
        if hole.fill == "int8":
            yield from (block.tobytes() for block in self._blocks(weight))
            return
        scale, place = np.broadcast_to(self._stored_scale(weight), weight.shape).flat, 0
        for block in self._blocks(weight):
            yield (block * scale[place : place + block.size]).astype("<f4").tobytes()
            place += block.size

    def _blocks(self, weight: Levels) -> Iterator[np.ndarray]:
        """The integers of a weight in stored order, `[block]` int8."""
        (n, k), left, rest = group(weight.bits), weight.size, b""
        step = BLOCK * k
        for chunk in self._checked(weight.data, weight.name):
            rest += chunk
            whole = len(rest) // step * step
            for place in range(0, whole, step):
                yield decode(rest[place : place + step], weight.bits)
                left -= 8 * BLOCK * n
            rest = rest[whole:]
        if rest:
            yield decode(rest, weight.bits)[:left]

    def _stored_scale(self, weight: Levels) -> np.ndarray:
        data = b"".join(self._checked(weight.scale, f"the scale of {weight.name}"))
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(weight.scale_shape)

    def _checked(self, section: Section, name: str) -> Iterator[bytes]:
        """The bytes of a section, some at a time; raises at its end where they are not those that were written."""
        place, left, found = self._begin + section.offset, section.bytes, 0
        while left:
            self._file.seek(place)
            chunk = self._file.read(min(left, CHUNK))
            if not chunk:
                raise self._damaged(f"it ends within {name}")
            found = zlib.crc32(chunk, found)
            place, left = place + len(chunk), left - len(chunk)
            if not left and found != section.crc32:
                raise self._damaged(f"the checksum of {name} differs")
            yield chunk

    def _weight(self, name: str) -> Levels:
        if name not in self.weights:
            raise PackedError(f"{self._path} has no weight {name!r}; it has {_listed(self.weights)}")
        return self.weights[name]

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC:
            raise PackedError(f"{self._path} is no packed file: it begins with {prefix[:8]!r}, not with {MAGIC!r}")
        if len(prefix) < PREFIX.size:
            raise self._damaged(f"it has {size} bytes, fewer than its first lines take")
        _, version, length, crc32, whole = PREFIX.unpack(prefix)
        if version != VERSION:
            raise PackedError(
                f"{self._path} is of version {version} of the format, and this client reads {VERSION}. Update "
                "snapgen-jax, or run the client.py that lies in the bundle"
            )
        if whole != size:
            raise self._damaged(f"it has {size:,} bytes, and was written with {whole:,}")
        compressed = self._file.read(min(length, LARGEST_HEADER))
        if len(compressed) != length or zlib.crc32(compressed) != crc32:
            raise self._damaged("the checksum of its header differs")
        self._begin = PREFIX.size + length
        try:
            header = json.loads(_Inflated(iter([compressed])).read(LARGEST_HEADER))
            self.weights = _by_name([_levels(entry) for entry in header["weights"]])
            self.arrays = _by_name([_array(entry) for entry in header["arrays"]])
            self.expanded = _expanded(header.get("expanded"), list(self.weights.values()))
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise self._damaged(f"its header is not one that can be read: {reason}") from error
        for name, section in self._sections():
            if section.offset < 0 or section.bytes < 0 or self._begin + section.offset + section.bytes > size:
                raise self._damaged(f"{name} would lie outside of it")

    def _sections(self) -> Iterator[tuple[str, Section]]:
        for weight in self.weights.values():
            yield from ((weight.name, weight.data), (f"the scale of {weight.name}", weight.scale))
        yield from ((array.name, array.data) for array in self.arrays.values())
        if self.expanded is not None:
            yield "the skeleton", self.expanded.skeleton

    def _damaged(self, reason: str) -> PackedError:
        return PackedError(f"the packed file {self._path} is damaged: {reason}. Copy it again")


def unpacked(
    packed: pathlib.Path, whole: Mapping[str, Any], folder: pathlib.Path, progress: Progress | None = None
) -> pathlib.Path:
    """The file that a packed one expands to, in a folder where the next start finds it.

    Its name has its checksum, so that it is never another one's, and it is there only when it was compared with that:
    later starts look at its length alone.

    Args:
        packed: the packed file.
        whole: what the manifest says of the file that it expands to: "bytes" and "sha256".
        folder: is made where it is not there.
        progress: see `Progress`; None logs that it is unpacked.

    Raises:
        PackedError: the file is damaged or not the manifest's, or the folder cannot hold what it expands to.
        Stopped: `progress` returned False.
    """
    digest, size = str(whole["sha256"]), whole["bytes"]
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise PackedError(f"manifest.json has {digest!r} as the SHA-256 of {packed.name}")
    target = folder / f"{packed.stem}_{digest[:16]}.tflite"
    if target.is_file() and target.stat().st_size == size:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with PackedFile(packed) as file:
            if file.expanded is None or (file.expanded.bytes, file.expanded.sha256) != (size, digest):
                raise PackedError(f"{packed.name} is not the packed file that manifest.json describes")
            log.info("unpacking %s, once, to %s: %s bytes", packed.name, target, f"{size:,}")
            return file.expand(target, progress)
    except OSError as error:
        raise PackedError(
            f"{packed.name} cannot be unpacked into {folder}: {error.strerror or error}. It takes {size:,} bytes; give "
            "another folder as `cache`, or as --cache on the command line"
        ) from error


class _Inflated:
    """Bytes that come deflated, some at a time."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._stream, self._input = chunks, zlib.decompressobj(), b""

    def read(self, most: int) -> bytes:
        """Up to so many; empty at the end."""
        out = io.BytesIO()
        while out.tell() < most and not self._stream.eof:
            if not self._input:
                self._input = next(self._chunks, b"")
                if not self._input:
                    break
            out.write(self._stream.decompress(self._input, most - out.tell()))
            self._input = self._stream.unconsumed_tail
        return out.getvalue()


def _section(entry: Sequence[int]) -> Section:
    offset, length, crc32 = (int(number) for number in entry)
    return Section(offset, length, crc32)


def _shape(entry: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(length) for length in entry)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape} is none")
    return shape


def _levels(entry: Mapping[str, Any]) -> Levels:
    shape, scale_shape = _shape(entry["shape"]), _shape(entry["scale_shape"])
    axes = _shape(entry.get("axes", range(len(shape))))
    weight = Levels(
        str(entry["name"]), shape, entry["bits"], _section(entry["data"]), scale_shape, _section(entry["scale"]), axes
    )
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(f"the axes {axes} of {weight.name} are not those of {shape}")
    if len(scale_shape) != len(shape) or any(n not in (1, m) for n, m in zip(scale_shape, shape, strict=True)):
        raise ValueError(f"the scale {scale_shape} of {weight.name} does not broadcast to {shape}")
    if (weight.data.bytes, weight.scale.bytes) != (stored_bytes(weight.size, weight.bits), 4 * math.prod(scale_shape)):
        raise ValueError(f"{weight.name} has another number of bytes than {shape} in {weight.bits} bits take")
    return weight


def _array(entry: Mapping[str, Any]) -> Array:
    array = Array(str(entry["name"]), _shape(entry["shape"]), str(entry["dtype"]), _section(entry["data"]))
    if array.dtype not in DTYPES:
        raise ValueError(f"{array.name} is of {array.dtype}; {', '.join(DTYPES)} are known")
    if array.data.bytes != math.prod(array.shape) * np.dtype(array.dtype).itemsize:
        raise ValueError(f"{array.name} has another number of bytes than {array.shape} of {array.dtype} take")
    return array


def _expanded(entry: Mapping[str, Any] | None, weights: Sequence[Levels]) -> Expanded | None:
    if entry is None:
        return None
    holes, place = [], 0
    for offset, fill, index in entry["holes"]:
        if fill not in ("int8", "float32", "scale") or not 0 <= index < len(weights):
            raise ValueError(f"it cannot fill a hole with {fill!r} of weight {index}")
        hole = Hole(int(offset), fill, weights[index])
        if hole.offset < place:
            raise ValueError("its holes overlap, or are in another order than the file")
        holes.append(hole)
        place = hole.offset + hole.bytes
    found = Expanded(int(entry["bytes"]), str(entry["sha256"]), _section(entry["skeleton"]), tuple(holes))
    if place > found.bytes:
        raise ValueError("a hole lies outside of the expanded file")
    return found


def _by_name(entries: Sequence[Any]) -> dict[str, Any]:
    named = {entry.name: entry for entry in entries}
    if len(named) < len(entries):
        raise ValueError("two entries have one name")
    return named


def _listed(names: Mapping[str, Any]) -> str:
    few = list(names)[:5]
    return ", ".join(few) + (" ..." if len(names) > len(few) else "") if few else "none"
