"""Batches that are drawn once, for the several runs that learn from them."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from snapgen_jax.training.loop import PlainBatch


@dataclasses.dataclass(frozen=True)
class KeptBatches:
    """The first batches of a stream, drawn once for the several runs that learn from them. Implements `loop.Batches`.

    Attributes:
        folder: where they are.
        bucket: that they are of.
    """

    folder: pathlib.Path
    bucket: str

    def draw(self, stream: Iterator[Any], count: int) -> None:
        """Keeps the first batches of a stream."""
        batches = list(itertools.islice(stream, count))
        arrays = {name: np.stack([batch.arrays[name] for batch in batches]) for name in batches[0].arrays}
        arrays["source_index"] = np.stack([batch.source_index for batch in batches])
        half = self.folder.with_name(f"{self.folder.name}.tmp")
        half.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(half / f"{name}.npy", array)
        half.rename(self.folder)

    def batches(self, position: int) -> Iterator[PlainBatch]:
        """From batch `position` on."""
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in self.folder.glob("*.npy")}
        index = arrays.pop("source_index")
        for i in range(position, len(index)):
            yield PlainBatch(self.bucket, {name: np.array(array[i]) for name, array in arrays.items()}, index[i])
