"""Tar files in webdataset's convention: members that share a name up to its first dot are one example.

    000017.jpg  000017.txt  000017.json

An image member has the extension of an image format. `txt` is a caption; the keys of `json` are columns. Nothing is
unpacked: a member's name serves as a name alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.images import EXTENSIONS
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.places import Place
from snapgen_jax.preparation.sources.interfaces import (
    RawExample,
    Unit,
    columns_of,
    files_of,
    refuse_missing,
    state_of,
    texts_of,
    weighted,
)

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TEXTS = ("txt", "cls", "json")
_CAPTION_COLUMNS = ("txt", "caption", "text")
_LOOKED_AT = 100  # examples of the first file, for the names of columns
_BLOCK = 512  # bytes of tar


class TarImages:
    """Tar files, each of which is a unit."""

    def __init__(self, config: CollectConfig):
        self._config, self._files = config, files_of(config.path, _SUFFIXES, "tar file")
        examples = itertools.chain.from_iterable(self._examples(*file) for file in self._files)
        members = [members for _, members in itertools.islice(examples, _LOOKED_AT)]
        first = [self._fields(found) for found in members]
        known = dict.fromkeys(column for _, columns, _ in first for column in columns)
        where = f"{config.path}, in its first examples,"
        asked = config.captions or [column for column in _CAPTION_COLUMNS if column in known][:1]
        if not asked and config.filters.least_characters and first:
            refuse_missing(_CAPTION_COLUMNS[:1], known, "caption", where)
        refuse_missing(asked, known, "caption column", where)
        refuse_missing([*config.all_numbers(), *config.texts], known, "column", where)
        if members and not any(image for image, _, _ in first):
            extensions = sorted({extension for found in members for extension in found})
            raise DataError(f"{where} holds no image {config.image}; its members are {', '.join(extensions)}")
        self._captions = tuple(asked)

    def units(self) -> list[Unit]:
        """A file each."""
        return [Unit(name, state_of(file), str(file)) for name, file in self._files]

    def read(self, unit: Unit) -> Iterator[RawExample]:
        """Each example by the names of its file and members. One that has no image is left out."""
        seen: set[str] = set()
        for key, members in self._examples(unit.name, epath.Path(unit.work)):
            id = f"{unit.name}/{key}"
            if id in seen:
                raise DataError(
                    f"{unit.work} holds {key} twice, apart from each other; an example's members stand together"
                )
            seen.add(id)
            image, columns, problem = self._fields(members)
            if image is None:
                continue
            data, place = (None, None) if problem else image
            texts = {column: texts_of(columns.get(column), id) for column in self._captions}
            captions = weighted(texts, self._config.captions)
            yield RawExample(id, data, captions, columns_of(columns, self._config, id), place, problem)

    def _fields(self, members: Mapping[str, Any]) -> tuple[tuple[bytes, Place | None] | None, dict[str, Any], str]:
        """The image and the columns of an example, and what is wrong with it."""
        images = [self._config.image] if self._config.image else [e for e in members if f".{e.lower()}" in EXTENSIONS]
        image = next((members[name] for name in images if name in members), None)
        columns: dict[str, Any] = {}
        problem = ""
        for extension, (data, _) in members.items():
            if extension == "json":
                try:
                    value = json.loads(data)
                except (ValueError, RecursionError) as error:
                    problem = f"its JSON cannot be read: {error}"
                    continue
                columns |= value if isinstance(value, dict) else {}
            elif extension in ("txt", "cls"):
                columns[extension] = data.decode("utf-8", "replace").strip()
        return image, columns, problem

    def _examples(self, name: str, file: epath.Path) -> Iterator[tuple[str, dict[str, tuple[bytes, Place | None]]]]:
        """(key, {extension: (bytes, place)}) of members that stand together."""
        members_of_all = _members(name, file, self._config.image)
        for key, members in itertools.groupby(members_of_all, key=lambda member: member[0]):
            yield key, {extension: (data, place) for _, extension, data, place in members}


def build(config: CollectConfig) -> TarImages:
    """The tar files of a config.

    Raises:
        DataError: there is none; the first is damaged, or lacks a column.
    """
    return TarImages(config)


def _members(name: str, file: epath.Path, image: str) -> Iterator[tuple[str, str, bytes, Place | None]]:
    """(key, extension, bytes, place) of the files in a tar; of other than images and texts there are no bytes.

    A place is told where the tar is not compressed.
    """
    plain = name.endswith(".tar")
    mode = "r:" if plain else "r:*"
    with (
        _whole(file),
        file.open("rb") as stream,
        tarfile.open(fileobj=stream, mode=mode, errors="backslashreplace") as tar,
    ):
        for member in tar:
            path = pathlib.PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise DataError(
                    f"{file} names a member {member.name!r}, which leaves its folder; expected a plain name"
                )
            base, _, extension = path.name.partition(".")
            content = tar.extractfile(member) if member.isfile() and base and extension else None
            if content is not None:
                place = Place(str(file), member.offset_data, member.size) if plain and not member.issparse() else None
                read = extension in (*_TEXTS, image) or f".{extension.lower()}" in EXTENSIONS
                yield str(path.parent / base), extension, content.read() if read else b"", place
            tar.members = []  # which it would keep for ever  # type: ignore[attr-defined]
        _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Python stops in silence at a header that is damaged, and where a file was cut between members."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(_BLOCK).strip(b"\0") or tar.fileobj.tell() < tar.offset + _BLOCK:
        raise tarfile.ReadError(f"no end of the archive at byte {tar.offset:,}")


@contextlib.contextmanager
def _whole(file: epath.Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file} is no whole tar file: {error}; copy it again, or leave it out") from error
