"""Buckets: the static shapes that a run's batches have, and which examples go to which."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.sources import Source

Specs = Mapping[str, Any]  # name -> anything with a shape, the global batch first

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One static shape.

    Attributes:
        name: what the recipe calls it.
        arrays: what its batches hold: "image", and what the tokenizer makes of captions.
        size: image height and width; None without images.
        lengths: {array of the tokenizer's: tokens in a caption}.
        local_batch: examples in one host's share of a global batch.
    """

    name: str
    arrays: tuple[str, ...]
    size: tuple[int, int] | None
    lengths: Mapping[str, int]
    local_batch: int

    @classmethod
    def of(cls, name: str, specs: Specs, host_count: int, text: Sequence[str] = ()) -> Bucket:
        """Reads a bucket off its specs.

        Args:
            name: what the recipe calls it.
            specs: its arrays.
            host_count: into how many shares a global batch is split.
            text: names of the arrays that the tokenizer gives.

        Raises:
            DataError: there is no such array, or the specs disagree or do not divide by the hosts.
        """
        shapes = {array: tuple(spec.shape) for array, spec in specs.items()}
        if unknown := sorted(shapes.keys() - {"image", *text}):
            raise DataError(
                f"bucket {name!r} asks for {', '.join(unknown)}; the data has {', '.join(('image', *text))}"
                + ("" if text else ", and captions for a tokenizer, of which there is none")
            )
        batches = {shape[0] for shape in shapes.values()}
        if len(batches) != 1:
            raise DataError(f"bucket {name!r}: the arrays differ in their global batch, {sorted(batches)}")
        batch = batches.pop()
        if batch % host_count:
            below, above = batch // host_count * host_count, -(-batch // host_count) * host_count
            near = f"{below} or {above}" if below else f"{above}"
            raise DataError(f"the global batch of {batch} does not divide by the {host_count} hosts; use {near}")
        lengths = {array: shape[1] for array, shape in shapes.items() if array != "image"}
        size = shapes["image"][1:3] if "image" in shapes else None
        return cls(name, tuple(shapes), size, lengths, batch // host_count)


def assign(source: Source, buckets: Sequence[Bucket]) -> dict[str, np.ndarray | range]:
    """{bucket: its examples}: by nearest aspect ratio, and among equal ones by nearest area.

    Where the source does not tell sizes, every bucket draws from all examples.
    """
    everything = range(len(source))
    sizes = source.sizes() if len(buckets) > 1 else None
    shaped = [bucket.size for bucket in buckets if bucket.size is not None]
    if sizes is None or len(shaped) < len(buckets):
        return {bucket.name: everything for bucket in buckets}
    log_size = np.log(np.maximum(sizes, 1))  # [N, 2]
    log_bucket = np.log(np.array(shaped))  # [K, 2]
    aspect, area = log_size[:, 0] - log_size[:, 1], log_size.sum(axis=1)
    bucket_aspect, bucket_area = log_bucket[:, 0] - log_bucket[:, 1], log_bucket.sum(axis=1)
    distance = np.abs(aspect[:, None] - bucket_aspect)  # [N, K]
    distance += 1e-6 * np.abs(area[:, None] - bucket_area)
    nearest = distance.argmin(axis=1)
    members: dict[str, np.ndarray | range] = {b.name: np.flatnonzero(nearest == k) for k, b in enumerate(buckets)}
    for name in (name for name, indices in members.items() if not len(indices)):
        log.warning("no image has a shape near bucket %r: it is never drawn", name)
    return members
