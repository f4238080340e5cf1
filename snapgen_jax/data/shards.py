"""A folder of shards: records in ArrayRecord files, and the manifest that says what they are.

    <folder>/manifest.json
    <folder>/<bucket>-00003-of-00064.array_record

`snapgen prepare` writes them; the source "stored" reads them. A shard is written whole or not at all, and the manifest
last, so that a folder without a manifest is one that is not done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.records import pack
from snapgen_jax.training.files import on_object_store, write_whole

MANIFEST = "manifest.json"
SCHEMA = 1
# A record a group, so that one is read without its neighbours.
_OPTIONS = "group_size:1,zstd:1"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
        file: its name within the folder.
        bucket: of which it holds examples; "" where images keep their own sizes.
        examples: how many.
        bytes: size of the file.
        sha256: of the file.
    """

    file: str
    bucket: str
    examples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One entry of the records.

    Attributes:
        dtype: NumPy's name of it, bfloat16 included; "text" for a string, "bytes" for an encoded image.
        shape: of one example; a height or width that differs between buckets is None.
        captions: whether there is one for each caption of the example, along a first axis that `shape` leaves out.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()
    captions: bool = False


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        kind: "images": encoded images and their captions, as they were collected. "encoded": what frozen encoders made
            of them.
        arrays: `{name: entry}` of every record.
        shards: the files, in the order of their examples.
        facts: what else there is to say, as JSON: encoders by fingerprint, scale and shift, filters, counts.
        schema: version of this form.
    """

    kind: Literal["images", "encoded"]
    arrays: Mapping[str, StoredArray]
    shards: tuple[Shard, ...]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schema: int = SCHEMA

    def examples(self, bucket: str | None = None) -> int:
        """How many examples there are, in a bucket or in all."""
        return sum(shard.examples for shard in self.shards if bucket in (None, shard.bucket))

    def buckets(self) -> tuple[str, ...]:
        """The buckets of the shards, in order."""
        return tuple(dict.fromkeys(shard.bucket for shard in self.shards))

    def write(self, folder: epath.PathLike) -> None:
        """Writes `manifest.json`, which says that the folder is done."""
        write_whole(
            epath.Path(folder) / MANIFEST, json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"
        )


def read_manifest(folder: epath.PathLike) -> Manifest:
    """Reads the manifest of a folder.

    Raises:
        DataError: there is none, it is none, or it is of a later version.
    """
    path = epath.Path(folder) / MANIFEST
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {MANIFEST}: it is no folder of shards, or its preparation has not ended; run "
            "`snapgen prepare` again, which goes on where it stopped"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; run `snapgen prepare` again") from error
    try:
        if found["schema"] > SCHEMA:
            raise DataError(f"{path} is of version {found['schema']}, and this program reads {SCHEMA}; update it")
        arrays = {
            name: StoredArray(entry["dtype"], tuple(entry["shape"]), entry["captions"])
            for name, entry in found["arrays"].items()
        }
        shards = tuple(Shard(**shard) for shard in found["shards"])
        manifest = Manifest(found["kind"], arrays, shards, found["facts"], found["schema"])
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no manifest of shards: {error!r}; run `snapgen prepare` again") from error
    for shard in shards:
        if pathlib.PurePath(shard.file).name != shard.file or "\\" in shard.file:
            raise DataError(f"{path} names the file {shard.file!r}, which leaves the folder; expected a plain name")
    return manifest


def check_files(folder: epath.PathLike, manifest: Manifest, buckets: Iterable[str] | None = None) -> None:
    """Compares the files with the manifest, by their sizes.

    Args:
        folder: of the shards.
        manifest: of the folder.
        buckets: whose shards are looked at; None for all.

    Raises:
        DataError: a shard is missing or truncated; says which.
    """
    wanted = None if buckets is None else set(buckets)
    for shard in manifest.shards:
        if wanted is not None and shard.bucket not in wanted:
            continue
        path = epath.Path(folder) / shard.file
        try:
            size = path.stat().length
        except FileNotFoundError:
            raise DataError(
                f"the shard {path} is missing, and {MANIFEST} lists it; copy it again, or remove {MANIFEST} and run "
                "`snapgen prepare` again, which makes what is missing"
            ) from None
        if size != shard.bytes:
            raise DataError(
                f"the shard {path} has {size:,} bytes, and {MANIFEST} says {shard.bytes:,}: it was cut or altered; "
                f"copy it again, or remove it and {MANIFEST} and run `snapgen prepare` again"
            )


def shard_name(prefix: str, number: int, count: int) -> str:
    """ "examples-00003-of-00064.array_record"."""
    return f"{prefix}-{number:05d}-of-{count:05d}.array_record"


def write_shard(folder: epath.PathLike, file: str, examples: Iterable[Mapping[str, Any]], bucket: str = "") -> Shard:
    """Writes one shard, whole or not at all. Equal examples make equal files.

    Raises:
        DataError: the disk is full or refuses; nothing is left of the shard.
    """
    path = epath.Path(folder) / file
    # Beside the shard, so that it is renamed; below the system's temporary folder where it is copied to a store.
    beside = None if on_object_store(path) else str(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=beside) as temporary:
            local, count = pathlib.Path(temporary) / file, 0
            writer = ArrayRecordWriter(str(local), _OPTIONS)
            try:
                for example in examples:
                    writer.write(pack(example))
                    count += 1
            finally:
                writer.close()
            with local.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            size = local.stat().st_size
            if beside is None:
                epath.Path(local).copy(path, overwrite=True)
            else:
                local.replace(str(path))
    except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter for what the disk says
        raise DataError(f"the shard {path} cannot be written: {error}; nothing of it is left") from error
    return Shard(file, bucket, count, size, digest)


class Records:
    """The records of some shards by index, in the order of the shards. Can be pickled; opened when first read."""

    def __init__(self, folder: epath.PathLike, shards: Iterable[Shard]):
        self._folder, self._shards = str(folder), tuple(shards)
        self._ends = np.cumsum([shard.examples for shard in self._shards])
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a record, as `records.unpack` takes them.

        Raises:
            DataError: the shard is damaged; says which, and at which record.
        """
        if self._opened is None:
            paths = [str(epath.Path(self._folder) / shard.file) for shard in self._shards]
            self._opened = grain.sources.ArrayRecordDataSource(paths)
        try:
            return self._opened[int(index)]
        except RuntimeError as error:
            raise DataError(f"{self.name(index)} cannot be read: {error}") from error

    def name(self, index: int) -> str:
        """ "shards/256x256-00003-of-00064.array_record, record 7"."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return f"{self._folder}/{self._shards[number].file}, record {index - first}"
