"""Tables of Arrow: Parquet files, and Hugging Face data sets that were saved on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.folder import inside
from snapgen_jax.data.words import class_caption
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.extra import require
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

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
_CAPTION_COLUMNS = ("text", "caption", "captions", "txt")
_ROWS_A_UNIT = 1000
_ROWS_AT_ONCE = 32  # in memory


class _Columns:
    """The columns that a config asks for, looked up in a schema once."""

    def __init__(self, schema: Any, config: CollectConfig, where: str):
        names = list(schema.names)
        image = [config.image] if config.image else [name for name in _IMAGE_COLUMNS if name in names][:1]
        refuse_missing(image or _IMAGE_COLUMNS[:1], names, "image column", where)
        captions = config.captions or [name for name in _CAPTION_COLUMNS if name in names][:1]
        if not captions and config.filters.least_characters:
            refuse_missing(_CAPTION_COLUMNS[:1], names, "caption column", where)
        refuse_missing(captions, names, "caption column", where)
        refuse_missing([*config.all_numbers(), *config.texts], names, "column", where)
        pyarrow = require("pyarrow")
        for name in config.all_numbers():
            kind = schema.field(name).type
            if not (
                pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)
            ):
                raise DataError(f"{where}: the column {name!r} is not numeric but {kind}; bound another one")
        self.image, self.captions = image[0], tuple(captions)
        self.all = list(dict.fromkeys([self.image, *captions, *config.all_numbers(), *config.texts]))


class ParquetImages:
    """Parquet files, each row group of which is a unit."""

    def __init__(self, config: CollectConfig):
        self._config, self._files = config, files_of(config.path, (".parquet",), "Parquet file")
        self._groups = {name: _opened(file, config)[1] for name, file in self._files}  # looks at every schema

    def units(self) -> list[Unit]:
        """A row group each."""
        return [
            Unit(f"{name}/{group}", state_of(file), (name, str(file), group, first))
            for name, file in self._files
            for group, first in enumerate(self._groups[name])
        ]

    def read(self, unit: Unit) -> Iterator[RawExample]:
        """Each row by its file and number."""
        name, path, group, first = unit.work
        file = epath.Path(path)
        with file.open("rb") as stream:
            parquet = require("pyarrow.parquet").ParquetFile(stream)
            columns = _Columns(parquet.schema_arrow, self._config, path)
            folder = self._config.images or str(file.parent)
            batches = parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns.all)
            number = first
            for batch in _readable(batches, path):
                for row in batch.to_pylist():
                    yield _example(f"{name}/{number:09d}", row, columns, self._config, folder)
                    number += 1


class HuggingFaceImages:
    """A data set that `datasets` saved on disk. A thousand rows are a unit."""

    def __init__(self, config: CollectConfig):
        self._config, self._data = config, None
        data = self._open()
        _Columns(data.features.arrow_schema, config, config.path)
        self._rows = len(data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def units(self) -> list[Unit]:
        """A range of rows each."""
        state = self._open()._fingerprint
        starts = range(0, self._rows, _ROWS_A_UNIT)
        return [Unit(f"{start:09d}", state, (start, min(start + _ROWS_A_UNIT, self._rows))) for start in starts]

    def read(self, unit: Unit) -> Iterator[RawExample]:
        """Each row by its number."""
        data, (start, stop) = self._open(), unit.work
        columns = _Columns(data.features.arrow_schema, self._config, self._config.path)
        data = data.select_columns(columns.all)
        names = {name: data.features[name].names for name in columns.captions if hasattr(data.features[name], "names")}
        arrow, folder = data.with_format("arrow"), self._config.images or self._config.path
        for first in range(start, stop, _ROWS_AT_ONCE):
            for offset, row in enumerate(arrow[first : min(first + _ROWS_AT_ONCE, stop)].to_pylist()):
                for name, words in names.items():
                    row[name] = None if row[name] is None or row[name] < 0 else class_caption(words[row[name]])
                yield _example(f"{first + offset:09d}", row, columns, self._config, folder)

    def _open(self) -> Any:
        if self._data is None:
            self._data = _saved(self._config)
        return self._data


def build(config: CollectConfig) -> ParquetImages | HuggingFaceImages:
    """The tables of a config.

    Raises:
        DataError: there is none, one is damaged, or lacks a column.
    """
    return ParquetImages(config) if config.source == "parquet" else HuggingFaceImages(config)


def _saved(config: CollectConfig) -> Any:
    datasets = require("datasets")
    try:
        found = datasets.load_from_disk(config.path)
    except Exception as error:  # many types, and of other libraries too
        raise DataError(
            f"{config.path} is no Hugging Face data set on disk: {error}; write one by `save_to_disk`"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            raise DataError(f"{config.path} has no split {config.split!r}; its splits are {', '.join(found)}")
        found = found[config.split]
    return found


def _opened(file: epath.Path, config: CollectConfig) -> tuple[_Columns, list[int]]:
    """The columns of a Parquet file, and the number of the first row of each of its groups."""
    with file.open("rb") as stream:
        try:
            parquet = require("pyarrow.parquet").ParquetFile(stream)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            schema = parquet.schema_arrow
        except (OSError, ValueError) as error:  # Arrow's own are of these
            raise DataError(f"{file} is no Parquet file: {error}; copy it again, or leave it out") from error
    return _Columns(schema, config, str(file)), [sum(sizes[:i]) for i in range(len(sizes))]


def _readable(batches: Iterator[Any], path: str) -> Iterator[Any]:
    try:
        yield from batches
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; copy it again, or leave it out") from error


def _example(id: str, row: Mapping[str, Any], columns: _Columns, config: CollectConfig, folder: str) -> RawExample:
    texts = {name: texts_of(row[name], id) for name in columns.captions}
    captions, others = weighted(texts, config.captions), columns_of(row, config, id)
    data, place, problem = _image(row[columns.image], folder, f"{id}, {columns.image}")
    return RawExample(id, data, captions, others, place, problem)


def _image(value: Any, folder: str, where: str) -> tuple[bytes | None, Place | None, str]:
    """The bytes of an image, their place, or why there are none."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value, None, ""
    if value is None:
        return None, None, "the row has no image"
    if not isinstance(value, str):
        raise DataError(f"{where}: an image is {type(value).__name__}; expected bytes, a path, or a struct of these")
    path = inside(folder, value, where)
    try:
        data = epath.Path(path).read_bytes()
    except OSError as error:
        return None, None, f"{value}: {error.strerror}"
    return data, Place(path, 0, len(data)), ""
