"""Data sets of TensorFlow Datasets, prepared as ArrayRecord, as `snapgen_jax.data.tfds_source` reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import UnreadableExampleError
from snapgen_jax.data.tfds_source import TfdsSource
from snapgen_jax.data.tfds_source import build as build_tfds
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.sources.interfaces import RawExample, Unit, columns_of, refuse_missing, weighted

_ROWS_A_UNIT = 1000


class TfdsImages:
    """A split of a data set. A thousand records are a unit."""

    def __init__(self, config: CollectConfig):
        self._config = config
        # One reader for each feature of captions; all but the first serve for their words alone.
        self._readers: dict[str, TfdsSource] = {name: _reader(config, name) for name in config.captions or ("",)}
        self._first = next(iter(self._readers.values()))
        refuse_missing([*config.all_numbers(), *config.texts], self._first.features(), "feature", config.name)

    def units(self) -> list[Unit]:
        """A range of records each."""
        state, count = f"{self._config.name} {self._config.split}", len(self._first)
        starts = range(0, count, _ROWS_A_UNIT)
        return [Unit(f"{start:09d}", f"{state} {count}", (start, min(start + _ROWS_A_UNIT, count))) for start in starts]

    def read(self, unit: Unit) -> Iterator[RawExample]:
        """Each record by its number."""
        for index in range(*unit.work):
            id = f"{self._config.name}/{self._config.split}/{index:09d}"
            try:
                record = self._first.record(index)
            except UnreadableExampleError as error:
                yield RawExample(id, None, (), columns_of({}, self._config, id), problem=str(error))
                continue
            texts = {name: reader.captions(record) for name, reader in self._readers.items()}
            row = {name: _plain(record[name]) for name in (*self._config.all_numbers(), *self._config.texts)}
            captions, columns = weighted(texts, self._config.captions), columns_of(row, self._config, id)
            yield RawExample(id, self._first.encoded_image(record), captions, columns)


def build(config: CollectConfig) -> TfdsImages:
    """The data set of a config.

    Raises:
        DataError: it is unknown or not prepared, or lacks a feature.
    """
    return TfdsImages(config)


def _reader(config: CollectConfig, captions: str) -> TfdsSource:
    return build_tfds(
        DataConfig(
            source="tfds",
            name=config.name,
            path=config.path,
            train_split=config.split,
            image_feature=config.image or "image",
            caption_feature=captions,
            class_names=config.class_names,
        ),
        "train",
    )


def _plain(value: Any) -> Any:
    """A Python number or text for an array without axes, or the value itself."""
    return value.item() if isinstance(value, np.ndarray | np.generic) and value.ndim == 0 else value
