"""A folder of images, with captions in the conventions of `snapgen_jax.data.folder`."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from snapgen_jax.data import folder
from snapgen_jax.data.errors import DataError
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.places import Place
from snapgen_jax.preparation.sources.interfaces import (
    Caption,
    RawExample,
    Unit,
    columns_of,
    refuse_missing,
    texts_of,
    weighted,
)

_IMAGES_A_UNIT = 512


class FolderImages:
    """Images below a folder; those without a caption among them."""

    def __init__(self, root: str, images: Sequence[folder.NamedImage], config: CollectConfig):
        self._root, self._images, self._config = root, images, config

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": ()}  # which travel as units

    def units(self) -> list[Unit]:
        """Some hundreds of images each."""
        found = []
        for start in range(0, len(self._images), _IMAGES_A_UNIT):
            images = self._images[start : start + _IMAGES_A_UNIT]
            state = hashlib.blake2b(digest_size=16)
            for image in images:
                state.update(repr((image, _stat(image.path), _stat(image.sidecar))).encode("utf-8", "surrogateescape"))
            found.append(Unit(f"{start:09d}", state.hexdigest(), tuple(images)))
        return found

    def read(self, unit: Unit) -> Iterator[RawExample]:
        """Each image by its path below the folder."""
        for image in unit.work:
            name = os.path.relpath(image.path, self._root)
            id = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            captions, columns = self._captions(image), self._columns(image)
            try:
                data = pathlib.Path(image.path).read_bytes()
            except OSError as error:
                yield RawExample(id, None, captions, columns, problem=str(error.strerror))
                continue
            yield RawExample(id, data, captions, columns, Place(image.path, 0, len(data)))

    def _captions(self, image: folder.NamedImage) -> tuple[Caption, ...]:
        if image.sidecar:
            return weighted({"txt": [folder.read_sidecar(pathlib.Path(image.sidecar))]}, {})
        found: list[Caption] = []
        for where, row in image.rows:
            columns = self._config.captions or _convention(row)
            refuse_missing(columns, row, "caption column", where)
            texts = {column: texts_of(row[column], where) for column in columns}
            for text in (text for values in texts.values() for text in values):
                folder.caption_of(text, where)
            found += weighted(texts, self._config.captions)
        return tuple(found)

    def _columns(self, image: folder.NamedImage) -> dict[str, float | str | None]:
        where, row = image.rows[0] if image.rows else (image.path, {})
        return columns_of(row, self._config, where)


def build(config: CollectConfig) -> FolderImages:
    """The folder of a config.

    Raises:
        DataError: it is missing, holds no image, or its metadata lacks a column that is asked for.
    """
    root = os.path.realpath(os.path.expanduser(config.path))
    if not os.path.isdir(root):
        raise DataError(f"path: there is no folder {config.path!r}")
    images = folder.find_all(root)
    rows = [(where, row) for image in images for where, row in image.rows]
    wanted = [*config.all_numbers(), *config.texts]
    if not rows and (config.captions or wanted):
        raise DataError(
            f"{root} has no column {next(iter([*config.captions, *wanted]))!r}: it holds no metadata.jsonl or "
            "metadata.csv; write one, with file_name and the columns, or ask for none"
        )
    for where, row in rows[:1]:
        refuse_missing(config.captions or _convention(row) or folder.CAPTION_COLUMNS[:1], row, "caption column", where)
    known = dict.fromkeys(column for _, row in rows for column in row)
    refuse_missing(wanted, known, "column", f"the metadata of {root}")
    return FolderImages(root, images, config)


def _convention(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(column for column in folder.CAPTION_COLUMNS if column in row)[:1]


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
