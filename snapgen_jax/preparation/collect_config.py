"""What `snapgen prepare collect` is asked: where images come from, what of them is kept, and how it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from snapgen_jax.bounds import FieldError, above, at_least, check, within

SourceName = Literal["folder", "tar", "parquet", "huggingface", "tfds", "shards"]


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which examples are kept. An example is rejected for the first reason that applies, in the order of these fields.

    Attributes:
        bounds: {numeric column: (least, greatest)}, each included, None for no bound: `{"aesthetic": (5.0, None)}`.
            An example in which the number is missing is rejected.
        least_characters: of a caption. A shorter one is dropped, and an example without any is rejected. 0 keeps
            images that have no caption: theirs is "".
        greatest_characters: of a caption; None for no bound. A longer one is dropped.
        least_side: pixels of the shorter side.
        greatest_aspect: longer side over shorter side; None for no bound.
        duplicates: "reject" keeps one of the examples whose image files are equal byte by byte, "keep" all of them.
            The one with the least id stays.
        near_duplicate_bits: an image is rejected if an earlier one, by id, has a perceptual hash (`imagehash.phash`)
            that differs in at most so many bits; None for no comparison. The hash sees brightness and no colour, so
            that photographs suit it, and plain drawings do not.
        hash_side: the perceptual hash has its square of bits: 64, 256 ... More than ten million images need 16 where
            any bit may differ: too many of them agree in some part of 64 bits.
    """

    bounds: Mapping[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)
    least_characters: int = 1
    greatest_characters: int | None = None
    least_side: int = 1
    greatest_aspect: float | None = None
    duplicates: Literal["reject", "keep"] = "reject"
    near_duplicate_bits: int | None = None
    hash_side: int = 8

    def __post_init__(self) -> None:
        check(self, bounds=within(-1e300, 1e300), least_characters=at_least(0), greatest_characters=at_least(1))
        check(self, least_side=at_least(1), greatest_aspect=at_least(1), near_duplicate_bits=within(0, 16))
        check(self, hash_side=within(4, 32))
        for column, (least, greatest) in self.bounds.items():
            if least is not None and greatest is not None and least > greatest:
                raise FieldError("bounds", f"keeps nothing: {column!r} from {least:g} to {greatest:g}; swap them")
        if self.greatest_characters is not None and self.greatest_characters < self.least_characters:
            raise FieldError("greatest_characters", f"is less than least_characters={self.least_characters}")
        if self.hash_side % 2:  # whole bytes
            raise FieldError("hash_side", f"is {self.hash_side}; give an even number")


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """From where to where.

    Attributes:
        source: "folder" (images with metadata.jsonl, metadata.csv or .txt files), "tar" (webdataset), "parquet",
            "huggingface" (a data set saved by `save_to_disk`), "tfds" (prepared as ArrayRecord) or "shards" (an
            earlier collection of ours, to filter it again).
        path: "folder", "huggingface", "shards": the folder. "tar", "parquet": a file, a folder of files, or a pattern
            such as "laion/*.tar". "tfds": the data directory; empty means TFDS's default.
        name: "tfds": the data set, "coco_captions/2014".
        split: "tfds", and "huggingface" where the folder holds several.
        image: column of the image; empty takes the source's convention. In a Parquet file it holds the bytes, or a
            struct with `bytes`, or the path of a file below `images`.
        images: "parquet", "huggingface": folder that paths of images start from; empty means that of the file or of
            the data set.
        captions: {column of captions: weight}; empty takes the source's convention. Training draws a caption by its
            weight; a column that holds a list shares its weight among them.
        class_names: "tfds": text file with one class name a line, where the data set's own names are codes.
        numbers: further columns to keep, as float64; those of `filters.bounds` are kept too.
        texts: further columns to keep, as text.
        filters: what is rejected.
        shards: how many files; 0 means as many as hold `shard_megabytes` each.
        shard_megabytes: about the size of a file.
        examples_shown: by `report.html` for each reason.
    """

    source: SourceName = "folder"
    path: str = ""
    name: str = ""
    split: str = "train"
    image: str = ""
    images: str = ""
    captions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    class_names: str = ""
    numbers: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    filters: FilterConfig = FilterConfig()
    shards: int = 0
    shard_megabytes: float = 256.0
    examples_shown: int = 8

    def __post_init__(self) -> None:
        check(self, captions=above(0), shards=within(0, 99_999), shard_megabytes=above(0), examples_shown=at_least(0))
        taken = {"image", "captions", "caption_weights", "height", "width", "id"}
        for field in ("numbers", "texts"):
            if clash := sorted(taken & set(getattr(self, field))):
                raise FieldError(field, f"names {clash[0]!r}, which every record has; rename that column")
        if both := sorted(set(self.all_numbers()) & set(self.texts)):
            raise FieldError("texts", f"names {both[0]!r}, which is asked for as a number too")
        if clash := sorted(taken & set(self.filters.bounds) - {"height", "width"}):
            raise FieldError("filters", f"bounds {clash[0]!r}, which is no number")

    def all_numbers(self) -> tuple[str, ...]:
        """The numeric columns that are read: asked for, or bounded."""
        return tuple(dict.fromkeys([*self.numbers, *self.filters.bounds]))
