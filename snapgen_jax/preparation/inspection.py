"""Looks at one example: whether it is kept, and what the sorting needs to know of it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from snapgen_jax.data.errors import UnreadableExampleError
from snapgen_jax.data.images import decode, format_of, header_size
from snapgen_jax.data.records import pack, unpack
from snapgen_jax.preparation.collect_config import CollectConfig, FilterConfig
from snapgen_jax.preparation.extra import require
from snapgen_jax.preparation.places import Place, spool, writing
from snapgen_jax.preparation.sources.interfaces import Caption, ImageSource, RawExample, Unit
from snapgen_jax.training.files import write_whole

KEPT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")
THUMBNAIL = 160  # pixels of the longer side

# Reasons, in the order in which they are looked for; beside them "column <name>" for a bound.
NO_CAPTION, CAPTION_LENGTH = "no caption", "caption length"
UNREADABLE, SMALL, ASPECT = "unreadable", "small", "aspect ratio"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"
MEANINGS = {
    "column": "a number is missing or out of its bounds",
    NO_CAPTION: "the source has no caption for the image",
    CAPTION_LENGTH: "every caption is too short or too long",
    UNREADABLE: "the file is missing, damaged, of an unknown format, or no picture",
    SMALL: "the shorter side has too few pixels",
    ASPECT: "the image is too long for its width, or too wide for its height",
    DUPLICATE: "the file equals that of a kept image byte by byte",
    NEAR_DUPLICATE: "the picture looks like that of an image with a lesser id",
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is known of an example without its bytes.

    Attributes:
        id: as in its source.
        captions: with weights that sum to 1.
        columns: numbers and texts to keep.
        reason: why it is rejected; "" where it is not.
        detail: the numbers of that reason, or the id of what it duplicates.
        place: of the bytes; None of a rejected one.
        height, width: as it is shown, in pixels; 0 where that is not known.
        digest: of the bytes.
        near: its perceptual hash; b"" where none is asked for.
        thumbnail: a JPEG of a rejected one, of the first few of its unit; else b"".
        twin: of a duplicate, where what it duplicates lies.
    """

    id: str
    captions: tuple[Caption, ...] = ()
    columns: Mapping[str, float | str | None] = dataclasses.field(default_factory=dict)
    reason: str = ""
    detail: str = ""
    place: Place | None = None
    height: int = 0
    width: int = 0
    digest: bytes = b""
    near: bytes = b""
    thumbnail: bytes = b""
    twin: Place | None = None


def inspect_unit(unit: Unit, source: ImageSource, config: CollectConfig, folder: str) -> Iterator[Candidate]:
    """Reads a unit, once: what was found is kept in a folder, and read from there when the work starts again.

    Args:
        unit: of the source.
        source: read where the folder knows nothing of the unit.
        config: of the collection.
        folder: of this collection's work.

    Raises:
        DataError: the unit is damaged, or the disk is full.
    """
    digest = hashlib.blake2b(f"{unit.name}\0{unit.state}".encode(), digest_size=16).hexdigest()
    done = epath.Path(folder) / f"{digest}.candidates"
    if not done.exists():
        found: list[Candidate] = []
        shown: dict[str, int] = {}
        with spool(epath.Path(folder) / f"{digest}.images") as keep:
            for raw in source.read(unit):
                candidate = inspect(raw, config, keep)
                shown[candidate.reason] = shown.get(candidate.reason, 0) + 1
                if candidate.reason and shown[candidate.reason] <= config.examples_shown and raw.image is not None:
                    candidate = dataclasses.replace(candidate, thumbnail=thumbnail(raw.image))
                found.append(candidate)
        with writing(done):
            write_whole(done, pack({"candidates": [dataclasses.asdict(candidate) for candidate in found]}))
    for values in unpack(done.read_bytes())["candidates"]:
        yield candidate_of(values)


def inspect(raw: RawExample, config: CollectConfig, keep: Callable[[bytes], Place]) -> Candidate:
    """Tries an example against the filters.

    Args:
        raw: as the source has it.
        config: of the collection.
        keep: finds a place for bytes that have none, or that are not as they were.
    """
    filters = config.filters
    captions, reason, detail = _captions(raw, filters)
    if wrong := _out_of_bounds(raw, filters):
        reason, detail = wrong
    candidate = Candidate(raw.id, captions, raw.columns)
    if reason:
        return dataclasses.replace(candidate, reason=reason, detail=detail)
    try:
        if raw.image is None:
            raise UnreadableExampleError(raw.problem)
        data, encoding = raw.image, format_of(raw.image)
        height, width = header_size(data)
        if height and (wrong := _misshapen(height, width, filters)):  # told without decoding
            return dataclasses.replace(candidate, reason=wrong[0], detail=wrong[1], height=height, width=width)
        pixels = decode(data)
    except UnreadableExampleError as error:
        return dataclasses.replace(candidate, reason=UNREADABLE, detail=str(error))
    height, width = pixels.shape[:2]
    if wrong := _misshapen(height, width, filters):
        return dataclasses.replace(candidate, reason=wrong[0], detail=wrong[1], height=height, width=width)
    place = raw.place
    if encoding not in KEPT_AS_THEY_ARE:
        data, place = _png(pixels), None
    return dataclasses.replace(
        candidate,
        place=place or keep(data),
        height=height,
        width=width,
        digest=digest_of(data),
        near=_perceptual_hash(pixels, filters),
    )


def digest_of(data: bytes) -> bytes:
    """By which equal files are known."""
    return hashlib.blake2b(data, digest_size=20).digest()


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of an image file; b"" where it cannot be read."""
    try:
        image = Image.fromarray(decode(data))
    except UnreadableExampleError:
        return b""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _captions(raw: RawExample, filters: FilterConfig) -> tuple[tuple[Caption, ...], str, str]:
    """The captions that are kept, their weights summing to 1; or all, with the reason why none is."""
    if not raw.captions:
        return ((("", 1.0),), "", "") if not filters.least_characters else ((), NO_CAPTION, "")
    greatest = filters.greatest_characters
    kept = [
        (text, weight)
        for text, weight in raw.captions
        if filters.least_characters <= len(text) and (greatest is None or len(text) <= greatest)
    ]
    if not kept:
        lengths = ", ".join(str(len(text)) for text, _ in raw.captions)
        return raw.captions, CAPTION_LENGTH, f"{lengths} characters"
    total = sum(weight for _, weight in kept)
    return tuple((text, weight / total) for text, weight in kept), "", ""


def _out_of_bounds(raw: RawExample, filters: FilterConfig) -> tuple[str, str] | None:
    for column, (least, greatest) in filters.bounds.items():
        value = raw.columns[column]
        if value is None:
            return f"column {column}", "missing"
        assert not isinstance(value, str)
        if (least is not None and value < least) or (greatest is not None and value > greatest):
            return f"column {column}", f"{value:g}"
    return None


def _misshapen(height: int, width: int, filters: FilterConfig) -> tuple[str, str] | None:
    if min(height, width) < filters.least_side:
        return SMALL, f"{width} x {height}"
    aspect = max(height, width) / min(height, width)
    if filters.greatest_aspect is not None and aspect > filters.greatest_aspect:
        return ASPECT, f"{width} x {height}, {aspect:.2f} to 1"
    return None


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _perceptual_hash(pixels: np.ndarray, filters: FilterConfig) -> bytes:
    if filters.near_duplicate_bits is None:
        return b""
    found = require("imagehash").phash(Image.fromarray(pixels), hash_size=filters.hash_side)
    return np.packbits(found.hash).tobytes()


def candidate_of(values: dict[str, Any]) -> Candidate:
    """The inverse of `dataclasses.asdict`, in which tuples have become lists."""
    captions = tuple((text, weight) for text, weight in values.pop("captions"))
    places = {name: Place(*value) if (value := values.pop(name)) else None for name in ("place", "twin")}
    return Candidate(captions=captions, **places, **values)
