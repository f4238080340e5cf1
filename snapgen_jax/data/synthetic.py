"""Batches of random numbers, drawn once: they cost no time, so that a run on them shows the device alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from snapgen_jax.data.buckets import Specs
from snapgen_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class SyntheticBatch:
    """This host's share of one global batch."""

    bucket: str
    arrays: dict[str, np.ndarray]
    source_index: np.ndarray


class SyntheticBatches:
    """One random batch for each bucket, the buckets in turn. Fits every recipe, since it asks for shapes alone."""

    def __init__(
        self,
        batch_specs: Mapping[str, Specs],
        *,
        bounds: Mapping[str, int] | None = None,
        seed: int = 0,
        host_index: int = 0,
        host_count: int = 1,
    ):
        """Draws the batches.

        Args:
            batch_specs: {bucket: {array: spec with the global batch in `shape[0]`}}. Masks are ones, pixels (uint8) are
                drawn evenly, and numbers that are no integers from a normal distribution.
            bounds: {array of other integers, such as token ids and class labels: how many values have a meaning, from
                0 on}.
            seed: of the numbers.
            host_index: which share this process has.
            host_count: into how many shares a global batch is split.

        Raises:
            DataError: a global batch does not divide by the hosts, or nothing says what an array of integers holds.
        """
        self._batches = []
        for bucket, specs in batch_specs.items():
            batch = next(iter(specs.values())).shape[0]
            if batch % host_count:
                raise DataError(f"the global batch of {batch} does not divide by the {host_count} hosts; change it")
            rng = np.random.default_rng((seed, host_index, len(self._batches)))
            local = batch // host_count
            arrays = {
                name: _draw(rng, name, (local, *spec.shape[1:]), spec.dtype, bounds or {})
                for name, spec in specs.items()
            }
            self._batches.append(SyntheticBatch(bucket, arrays, np.arange(local) + host_index * local))

    def batches(self, position: int = 0) -> Iterator[SyntheticBatch]:
        """The batches from a position on, without end."""
        while True:
            yield self._batches[position % len(self._batches)]
            position += 1


def _draw(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: Any, bounds: Mapping[str, int]
) -> np.ndarray:
    if name == "mask" or name.endswith("_mask"):
        return np.ones(shape, dtype)
    if not np.issubdtype(dtype, np.integer):
        return rng.standard_normal(shape, np.float32).astype(dtype)
    bound = 256 if dtype == np.uint8 else bounds.get(name)
    if bound is None:
        raise DataError(
            f"the batches hold integers {name!r}, and nothing says which have a meaning; name their number in "
            "`integer_bounds` of the inputs"
        )
    return rng.integers(0, bound, shape).astype(dtype)
