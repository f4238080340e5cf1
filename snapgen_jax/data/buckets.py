"""Buckets: the static shapes that a run's batches have, and which examples go to which."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.data.arrays import ArraySpec, listed
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.sources import Indices, Source
from snapgen_jax.data.tokenizer import CaptionTokenizer, mask_name

Specs = Mapping[str, Any]  # name -> anything with a shape and a dtype, the global batch first

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One static shape.

    Attributes:
        name: what the recipe calls it.
        shapes: {entry of the source: shape of one example in a batch}.
        lengths: {text of the source: {array that is made of it: tokens}}.
        view: the image that decides the crop, the first that the source declares; "" without images.
        local_batch: examples in one host's share of a global batch.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    lengths: Mapping[str, Mapping[str, int]]
    view: str
    local_batch: int

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the image that decides the crop; None without images."""
        if not self.view:
            return None
        height, width = self.shapes[self.view][-3:-1]
        return height, width

    @property
    def entries(self) -> tuple[str, ...]:
        """What is read of an example."""
        return (*self.shapes, *self.lengths)

    @classmethod
    def of(
        cls,
        name: str,
        specs: Specs,
        host_count: int,
        declared: Mapping[str, ArraySpec],
        tokenizer: CaptionTokenizer | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> Bucket:
        """Reads a bucket off its specs. An array is made by the tokenizer, or is an entry of the source.

        Args:
            name: what the recipe calls it.
            specs: its arrays.
            host_count: into how many shares a global batch is split.
            declared: what the source has.
            tokenizer: what makes arrays of texts.
            texts: {array of token ids: text that it is made of}, "caption" by default.

        Raises:
            DataError: there is no such array, it has another shape or dtype, or the specs disagree or do not divide by
                the hosts.
        """
        # What is stored is not made again.
        made = _text_of_arrays(tokenizer, texts or {})
        sources = {array: text for array, text in made.items() if array not in declared}
        where = f"bucket {name!r}"
        if unknown := sorted(specs.keys() - declared.keys() - sources.keys()):
            given = f"the tokenizers give {', '.join(sources)}" if sources else "there is no tokenizer"
            raise DataError(
                f"{where} asks for {', '.join(unknown)}; the source has {listed(declared)}, and {given}; choose "
                "another data.source, or inputs that it has"
            )
        lengths: dict[str, dict[str, int]] = {}
        for array, text in sources.items():
            if array in specs:
                if len(specs[array].shape) != 2:
                    raise DataError(f"{where}: {array} is of the shape {specs[array].shape}, and token ids are [B, L]")
                if text not in declared or declared[text].kind != "text":
                    raise DataError(
                        f"{where}: {array} is made of the text {text!r}, and the source has {listed(declared)}; set "
                        "data.texts, or choose another source"
                    )
                lengths.setdefault(text, {})[array] = specs[array].shape[1]
        for made in lengths.values():
            assert tokenizer is not None
            for array, example in tokenizer.arrays([""], made).items():  # what it cannot give is refused here
                _check_dtype(where, array, specs[array].dtype, example.dtype, "the tokenizer gives")
        shapes = {entry: tuple(specs[entry].shape[1:]) for entry in declared if entry in specs and entry not in sources}
        for entry, shape in shapes.items():
            _check_entry(where, entry, shape, specs[entry].dtype, declared[entry])
        view = next((entry for entry in shapes if declared[entry].kind == "image"), "")
        for entry, shape in shapes.items():
            if declared[entry].kind == "image":
                (h, w), (own_h, own_w) = shape[-3:-1], shapes[view][-3:-1]
                if h * own_w != w * own_h:
                    raise DataError(
                        f"{where}: {view} is {own_h}x{own_w} and {entry} {h}x{w}; the images of an example share one "
                        "crop, so their aspect ratios must be equal"
                    )
        return cls(name, shapes, lengths, view, _local_batch(where, specs, host_count))


def _text_of_arrays(tokenizer: CaptionTokenizer | None, texts: Mapping[str, str]) -> dict[str, str]:
    """{array of ids or mask: the text that it is made of}, of all that a tokenizer gives."""
    names = () if tokenizer is None else tokenizer.names
    masks = {mask_name(name) for name in names}
    ids = [name for name in names if name not in masks]
    if unknown := sorted(texts.keys() - set(ids)):
        have = f"the arrays of token ids are {', '.join(ids)}" if ids else "no array of token ids is made"
        raise DataError(f"data.texts names {', '.join(unknown)}; {have}")
    return {array: texts.get(name, "caption") for name in ids for array in (name, mask_name(name)) if array in names}


def _check_entry(where: str, name: str, shape: tuple[int, ...], dtype: Any, declared: ArraySpec) -> None:
    if declared.kind == "text":
        raise DataError(f"{where} asks for {name}, which is a text of the source; name the array of its token ids")
    _check_dtype(where, name, dtype, declared.dtype, "the source has")
    has = declared.shape
    if declared.kind == "image" and len(shape) == len(has):
        has = (*has[:-3], *shape[-3:-1], has[-1])  # it is resized to any height and width
    elif len(shape) == len(has):
        has = tuple(b if a is None else a for a, b in zip(has, shape, strict=True))  # each bucket has its own
    if shape != has:
        wanted = f"{np.dtype(dtype).name} [{', '.join(map(str, shape))}]"
        raise DataError(f"{where} asks for {name} as {wanted}, and the source has {declared}")


def _check_dtype(where: str, name: str, wanted: Any, has: Any, who: str) -> None:
    if np.dtype(wanted) != np.dtype(has):
        raise DataError(f"{where} asks for {name} as {np.dtype(wanted).name}, and {who} {np.dtype(has).name}")


def _local_batch(where: str, specs: Specs, host_count: int) -> int:
    batches = {spec.shape[0] for spec in specs.values()}
    if len(batches) != 1:
        raise DataError(f"{where}: the arrays differ in their global batch, {sorted(batches)}")
    batch = batches.pop()
    if batch % host_count:
        below, above = batch // host_count * host_count, -(-batch // host_count) * host_count
        near = f"{below} or {above}" if below else f"{above}"
        raise DataError(f"the global batch of {batch} does not divide by the {host_count} hosts; use {near}")
    return batch // host_count


def assign(source: Source, buckets: Sequence[Bucket]) -> dict[str, Indices]:
    """{bucket: its examples}: by nearest aspect ratio, and among equal ones by nearest area; or as they were stored.

    Where the source does not tell sizes, every bucket draws from all examples.

    Raises:
        DataError: the examples were stored for other buckets.
    """
    everything = range(len(source))
    if (stored := source.buckets()) is not None:
        return _as_stored(stored, [bucket.name for bucket in buckets])
    sizes = source.sizes() if len(buckets) > 1 else None
    shaped = [bucket.size for bucket in buckets if bucket.size is not None]
    if sizes is None or len(shaped) < len(buckets):
        return {bucket.name: everything for bucket in buckets}
    nearest = nearest_size(sizes, shaped)
    members: dict[str, Indices] = {b.name: np.flatnonzero(nearest == k) for k, b in enumerate(buckets)}
    for name in (name for name, indices in members.items() if not len(indices)):
        log.warning("no image has a shape near bucket %r: it is never drawn", name)
    return members


def nearest_size(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket of each image, int `[N]`: of the nearest aspect ratio, and among equal ones of the nearest area.

    Args:
        sizes: int `[N, 2]` heights and widths of images.
        buckets: height and width of each bucket.
    """
    log_size = np.log(np.maximum(sizes, 1))  # [N, 2]
    log_bucket = np.log(np.array(buckets))  # [K, 2]
    aspect, area = log_size[:, 0] - log_size[:, 1], log_size.sum(axis=1)
    bucket_aspect, bucket_area = log_bucket[:, 0] - log_bucket[:, 1], log_bucket.sum(axis=1)
    distance = np.abs(aspect[:, None] - bucket_aspect)  # [N, K]
    distance += 1e-6 * np.abs(area[:, None] - bucket_area)
    return distance.argmin(axis=1)


def _as_stored(stored: Mapping[str, Indices], asked: Sequence[str]) -> dict[str, Indices]:
    if surplus := [name for name, indices in stored.items() if len(indices) and name not in asked]:
        raise DataError(
            f"examples are stored in the sizes {', '.join(surplus)}, and no bucket has these; the buckets are "
            f"{', '.join(asked)}. Add the sizes to inputs.image_sizes, or name shards of these buckets in data.path"
        )
    if missing := [name for name in asked if name not in stored]:
        raise DataError(
            f"nothing is stored for the buckets {', '.join(missing)}; the shards are of {', '.join(stored)}. Take "
            "these as inputs.image_sizes, or run `snapgen prepare encode` with this config"
        )
    return {name: stored[name] for name in asked}


def weights(buckets: Sequence[Bucket], members: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """{bucket: its relative share of the batches}, without the buckets that are never drawn.

    Args:
        buckets: all of them.
        members: {bucket: how many examples it has}, or their share.
        shares: {bucket: its share} as a config sets them; empty for the shares of examples.

    Raises:
        DataError: `shares` names an unknown or an empty bucket, leaves one out, or is not made of shares.
    """
    counts = {bucket.name: members[bucket.name] / bucket.local_batch for bucket in buckets}
    filled = {name: count for name, count in counts.items() if count}
    if not shares:
        return filled
    if unknown := sorted(shares.keys() - counts.keys()):
        raise DataError(f"data.bucket_shares names {', '.join(unknown)}; the buckets are {', '.join(counts)}")
    if not all(0 <= share < math.inf for share in shares.values()) or not any(shares.values()):
        raise DataError(f"data.bucket_shares must be numbers from 0 on, one at least above 0; got {dict(shares)}")
    if empty := [name for name, share in shares.items() if share and name not in filled]:
        raise DataError(
            f"data.bucket_shares asks for {', '.join(empty)}, and no example has a shape near to it; leave it out, or "
            f"add such examples. The buckets with examples are {', '.join(filled)}"
        )
    if left_out := [name for name in filled if name not in shares]:
        raise DataError(f"data.bucket_shares leaves out {', '.join(left_out)}; a share of 0 means never")
    return {name: float(shares[name]) for name in filled if shares[name]}
