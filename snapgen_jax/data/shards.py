"""A folder of shards: records in ArrayRecord files, and the manifest that says what they are.

    <folder>/manifest.json
    <folder>/<bucket>-00003-of-00064.array_record

`snapgen prepare` writes them; the source "stored" reads them. A shard is written whole or not at all, and the manifest
last, so that a folder without a manifest is one that is not done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.records import pack
from snapgen_jax.training.files import on_object_store, write_whole

MANIFEST = "manifest.json"
SCHEMA = 1
# A record a group, so that one is read without its neighbours.
_OPTIONS = "group_size:1,zstd:1"
_OPEN = 256  # shards that a process keeps open; 1,024 files are what a system allows at least
_STATS = 32  # files looked at together: one look at a mounted bucket takes milliseconds


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
    shards = [shard for shard in manifest.shards if wanted is None or shard.bucket in wanted]

    def check_one(shard: Shard) -> None:
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

    with ThreadPoolExecutor(_STATS) as pool:
        for _ in pool.map(check_one, shards):
            pass


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
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".writing-", dir=beside)
    with temporary as name:
        local, count = pathlib.Path(name) / file, 0
        with _disk(path):
            writer = ArrayRecordWriter(str(local), _OPTIONS)
        try:
            for example in examples:  # whose own errors are none of the disk
                record = pack(example)
                with _disk(path):
                    writer.write(record)
                count += 1
        except BaseException:
            with contextlib.suppress(Exception):
                writer.close()
            raise
        with _disk(path):
            writer.close()
            with local.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            size = local.stat().st_size
            if beside is None:
                epath.Path(local).copy(path, overwrite=True)
            else:
                local.replace(str(path))
    return Shard(file, bucket, count, size, digest)


@contextlib.contextmanager
def _disk(path: epath.Path) -> Iterator[None]:
    """Turns what the disk says into a `DataError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter
        raise DataError(f"the shard {path} cannot be written: {error}; nothing of it is left") from error


class Records:
    """The records of some shards by index, in the order of the shards. Can be pickled; opened when first read.

    Of all folders together a process keeps the latest `_OPEN` shards open, so that neither their number nor that of
    the folders of a mixture meets the limit of open files.
    """

    def __init__(self, folder: epath.PathLike, shards: Iterable[Shard]):
        self._folder, self._shards = str(folder), tuple(shards)
        self._ends = np.cumsum([shard.examples for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a record, as `records.unpack` takes them.

        Raises:
            DataError: the shard is damaged; says which, and at which record.
        """
        shard, position = self._place(index)
        try:
            return _reader(str(epath.Path(self._folder) / shard.file)).read([position])[0]
        except (IndexError, OSError, RuntimeError) as error:
            raise DataError(f"{self.name(index)} cannot be read: {error}; copy the shard again") from error

    def name(self, index: int) -> str:
        """ "shards/256x256-00003-of-00064.array_record, record 7"."""
        shard, position = self._place(index)
        return f"{self._folder}/{shard.file}, record {position}"

    def _place(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[number], int(index) - (int(self._ends[number - 1]) if number else 0)


@functools.lru_cache(maxsize=_OPEN)
def _reader(path: str) -> ArrayRecordReader:
    """An open shard; it closes when the last thread that reads it lets go."""
    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32_768)


def check_readable(folder: epath.PathLike, manifest: Manifest) -> None:
    """Opens the first shard of a folder on an object store, which not every build of ArrayRecord reads.

    Raises:
        DataError: it cannot be opened; says what to do.
    """
    if not on_object_store(folder) or not manifest.shards:
        return
    path = str(epath.Path(folder) / manifest.shards[0].file)
    try:
        _reader(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read where it is ({str(error).splitlines()[0]}): this build of ArrayRecord reads files "
            "alone. Mount the bucket (`launch.tpu_vm create --mount=BUCKET`, `launch.gke mount`, or `gcsfuse`) and "
            "give the path below the mount as data.path"
        ) from error
