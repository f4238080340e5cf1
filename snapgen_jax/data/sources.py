"""What a data source is, and the registry of the sources there are."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Protocol

import numpy as np

from snapgen_jax.data.config import DataConfig, Split
from snapgen_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Example:
    """One image, uint8 `[h, w, 3]`, and what it shows."""

    image: np.ndarray
    caption: str


class Source(Protocol):
    """Examples by index. Every draw (phrasing, choice among captions) comes from `rng`, so an example is a pure
    function of its arguments. A source can be pickled, since worker processes get a copy."""

    def __len__(self) -> int:
        """The number of examples in an epoch."""
        ...

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The example; raises `UnreadableExampleError` where it cannot be read."""
        ...

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """A caption of the example, without decoding its image."""
        ...

    def name(self, index: int) -> str:
        """What a person calls the example: a path, or a number in a data set."""
        ...

    def sizes(self) -> np.ndarray | None:
        """int `[N, 2]` heights and widths; None where an example may go to any bucket."""
        ...


# source name -> module with `build(config, split) -> Source`; imported when used.
SOURCES = {
    "shapes": "snapgen_jax.data.shapes_source",
    "digits": "snapgen_jax.data.digits",
    "folder": "snapgen_jax.data.folder",
    "tfds": "snapgen_jax.data.tfds_source",
}


def build_source(config: DataConfig, split: Split = "train") -> Source:
    """Builds the source that a config names. Raises `DataError` where it is unknown, missing or empty."""
    if config.source not in SOURCES:
        raise DataError(f"unknown data source {config.source!r}; the sources are {', '.join(SOURCES)}")
    source = importlib.import_module(SOURCES[config.source]).build(config, split)
    if len(source) == 0:
        raise DataError(f"data source {config.source!r} has no examples in its {split} split")
    return source


def hold_out(count: int, split: Split, share: float) -> np.ndarray:
    """The indices of a split, ascending, by a fixed permutation of `count` examples.

    The validation split holds `share` of them. Where that is less than one example, validation repeats the training
    split, which is then whole: a folder of ten photographs has none to spare.
    """
    held = int(count * share)
    if held == 0:
        return np.arange(count)
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[:held] if split == "validation" else order[held:])
