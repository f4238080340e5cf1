"""Shards of `snapgen prepare`, of either kind.

"images": pictures and captions as they were collected; they are cropped, resized and tokenized as of any source. There
may be several pictures of an example, such as the two of a pair.
"encoded": what frozen encoders made of them: latents of the bucket that an example was encoded for, and of each of its
captions text states or token ids. Of several captions each draw takes one, by their weights where they have any.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from snapgen_jax.data.arrays import IMAGE, TEXT, ArraySpec, Example
from snapgen_jax.data.config import SourceConfig, Split
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.images import decode
from snapgen_jax.data.records import unpack
from snapgen_jax.data.shards import Manifest, Records, check_files, check_readable, read_manifest
from snapgen_jax.data.sources import Indices, asked, hold_out, holds_out
from snapgen_jax.data.words import pick_index


class StoredSource:
    """Examples of a folder of shards.

    Attributes:
        folder: of the shards.
        manifest: what it holds.
    """

    def __init__(self, folder: epath.PathLike, manifest: Manifest, indices: Indices, held_out: bool = True):
        """`indices`: which of the folder's examples, ascending."""
        self.folder, self.manifest, self.held_out = str(folder), manifest, held_out
        self._records, self._indices = Records(folder, manifest.shards), indices

    def __len__(self) -> int:
        return len(self._indices)

    def spec(self) -> dict[str, ArraySpec]:
        """Images and caption; or the arrays of the manifest, and the caption that they are of."""
        if self.manifest.kind == "images":
            return {**dict.fromkeys(self._images(), IMAGE), "caption": TEXT}
        arrays = {
            name: ArraySpec("array", array.shape, np.dtype(array.dtype))
            for name, array in self.manifest.arrays.items()
            if array.dtype not in ("text", "bytes")
        }
        return {**arrays, "caption": TEXT}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The pictures at their own size and one caption; or the arrays of one caption. "" without captions."""
        record = self._record(index)
        captions = record["captions"]
        chosen = pick_index(rng, max(1, len(captions)), record.get("caption_weights"))
        caption = {"caption": captions[chosen] if captions else ""}
        if self.manifest.kind == "images":
            return {**{name: decode(record[name]) for name in self._images() if asked(name, names)}, **caption}
        arrays = {
            name: record[name][chosen] if array.captions else record[name]
            for name, array in self.manifest.arrays.items()
            if name in record and asked(name, names)
        }
        return {**arrays, **caption}

    def _images(self) -> tuple[str, ...]:
        """The encoded images of an example, `image` first: its shape decides the crop of all."""
        held = [name for name, array in self.manifest.arrays.items() if array.dtype == "bytes"]
        return tuple(sorted(held, key=lambda name: (name != "image", name)))

    def _record(self, index: int) -> dict[str, Any]:
        place = int(self._indices[index])
        record = self._records[place]
        try:
            return unpack(record)
        except ValueError as error:
            raise UnreadableExampleError(f"{self._records.name(place)}: {error}") from error

    def name(self, index: int) -> str:
        """The shard, and the number of the record within it."""
        return self._records.name(int(self._indices[index]))

    def sizes(self) -> np.ndarray | None:
        """int64 `[N, 2]` of images, read from every record; None of what is encoded."""
        if self.manifest.kind == "encoded":
            return None
        records = (self._record(index) for index in range(len(self)))
        return np.array([(int(record["height"]), int(record["width"])) for record in records], np.int64).reshape(-1, 2)

    def buckets(self) -> Mapping[str, Indices] | None:
        """`{bucket: its examples}` of what is encoded, in the order of its sizes; None of images."""
        if self.manifest.kind == "images":
            return None
        members: dict[str, Indices] = {name: range(0) for name in self.manifest.facts.get("sizes", {})}
        start = 0
        for name in self.manifest.buckets():
            stop = start + self.manifest.examples(name)
            inside = _between(self._indices, start, stop)
            members[name], start = inside, stop
        return members


def _between(indices: Indices, start: int, stop: int) -> Indices:
    """Positions of the ascending `indices` whose values lie from `start` up to `stop`."""
    if isinstance(indices, range):
        return range(max(start - indices.start, 0), min(stop, indices.stop) - indices.start)
    first, last = np.searchsorted(indices, [start, stop])
    return range(int(first), int(last))


def build(config: SourceConfig, split: Split) -> StoredSource:
    """The stored source of a config. Validation is `validation_path`, or a fixed random share of the examples.

    Raises:
        DataError: no folder is named, it has no manifest, or a shard is missing or cut.
    """
    if not config.path:
        raise DataError(
            "data.path is not set: this config reads shards. Make them once, `snapgen prepare collect ... "
            "--out=IMAGES`, then `snapgen prepare encode --config=CONFIG --images=IMAGES --out=SHARDS`, and give "
            "--config.data.path=SHARDS; or try speed and memory with --config.data.source=synthetic"
        )
    apart = bool(config.validation_path)
    folder = os.path.expanduser(config.validation_path if apart and split == "validation" else config.path)
    manifest = read_manifest(folder)
    check_readable(folder, manifest)
    check_files(folder, manifest)
    if [shard.bucket for shard in manifest.shards] != _grouped(manifest):
        raise DataError(f"{folder}: the shards of a bucket do not follow each other in the manifest; prepare it again")
    count = manifest.examples()
    if apart or not holds_out(count, config.validation_share):
        held_out = apart or split == "train"
        return StoredSource(folder, manifest, range(count), held_out)
    return StoredSource(folder, manifest, hold_out(count, split, config.validation_share))


def _grouped(manifest: Manifest) -> list[str]:
    """The bucket of each shard, if those of a bucket followed each other."""
    return [name for name in manifest.buckets() for shard in manifest.shards if shard.bucket == name]
