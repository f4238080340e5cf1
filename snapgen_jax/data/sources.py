"""What a data source is, and the registry of the sources there are."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from snapgen_jax.data.arrays import ArraySpec, Example
from snapgen_jax.data.config import DataConfig, SourceConfig, Split
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.mixture import Mixture

Indices = np.ndarray | range


class Source(Protocol):
    """Examples by index. Every draw (phrasing, choice among captions) comes from `rng`, so an example is a pure
    function of its arguments. A source can be pickled, since worker processes get a copy.

    Attributes:
        held_out: False for a validation split of examples that the training split has too; else True.
    """

    held_out: bool

    def __len__(self) -> int:
        """The number of examples in an epoch."""
        ...

    def spec(self) -> dict[str, ArraySpec]:
        """`{name: ArraySpec}` of the entries that every example has. The first image among those that a batch needs is
        the one whose shape decides the crop."""
        ...

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The entries of an example, at least those that `names` lists; None for all.

        `names` only saves reading. The same draws are made whatever it lists, so an entry is always the same.

        Raises:
            UnreadableExampleError: the example cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a person calls the example: a path, or a number in a data set."""
        ...

    def sizes(self) -> np.ndarray | None:
        """int `[N, 2]` heights and widths; None where an example may go to any bucket."""
        ...

    def buckets(self) -> Mapping[str, Indices] | None:
        """`{bucket: its examples}` where each was stored for one bucket; None where `sizes` decides."""
        ...


# source name -> module with `build(config: SourceConfig, split) -> Source`; imported when used.
SOURCES = {
    "shapes": "snapgen_jax.data.shapes_source",
    "digits": "snapgen_jax.data.digits",
    "folder": "snapgen_jax.data.folder",
    "tfds": "snapgen_jax.data.tfds_source",
    "stored": "snapgen_jax.data.stored_source",
    "new_object": "snapgen_jax.data.new_object",
    "prompts": "snapgen_jax.data.prompt_file",
    "shapes_changes": "snapgen_jax.data.shapes_changes",
}


def build_source(config: DataConfig, split: Split = "train") -> Source:
    """The source that a config names, or the mixture of several. Raises `DataError` where one is unknown, missing or
    empty, or where those of a mixture differ."""
    if not config.mixture:
        return _build(config, split)
    return Mixture([_build(domain, split) for domain in config.mixture], [d.weight for d in config.mixture])


def _build(config: SourceConfig, split: Split) -> Source:
    if config.source == "synthetic":
        raise DataError("data.source is 'synthetic': random batches hold no examples; train with another data.source")
    if config.source not in SOURCES:
        raise DataError(f"unknown data source {config.source!r}; the sources are {', '.join(SOURCES)}")
    source = importlib.import_module(SOURCES[config.source]).build(config, split)
    if len(source) == 0:
        raise DataError(f"data source {config.source!r} has no examples in its {split} split")
    return source


def hold_out(count: int, split: Split, share: float) -> np.ndarray:
    """The indices of a split, ascending, by a fixed permutation of `count` examples.

    The validation split holds `share` of them. Where that is less than one example, validation repeats the training
    split, which is then whole: a folder of ten photographs has none to spare. See `holds_out`.
    """
    held = int(count * share)
    if not holds_out(count, share):
        return np.arange(count)
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[:held] if split == "validation" else order[held:])


def holds_out(count: int, share: float) -> bool:
    """Whether `hold_out` keeps any example from the training split."""
    return int(count * share) > 0


def asked(name: str, names: Collection[str] | None) -> bool:
    """Whether `names`, as `Source.example` takes them, list an entry."""
    return names is None or name in names
