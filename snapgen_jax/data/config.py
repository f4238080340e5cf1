"""The data section of an experiment's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from snapgen_jax.bounds import SHARE, FieldError, above, at_least, below, check
from snapgen_jax.data.shapes_grammar import ShapesConfig

Split = Literal["train", "validation"]
Crop = Literal["centre", "random"]
Flip = Literal["none", "random"]
SourceName = Literal[
    "shapes", "digits", "folder", "tfds", "stored", "new_object", "shapes_changes", "prompts", "synthetic"
]


@dataclasses.dataclass(frozen=True)
class NewObjectConfig:
    """A few pictures of an object that no scene of the shapes world has: something to teach a trained network.

    Attributes:
        kind: what is drawn.
        word: what captions call it.
        examples: how many pictures there are.
        seed: which.
    """

    kind: Literal["moon"] = "moon"
    word: str = "moon"
    examples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, examples=at_least(1), seed=at_least(0))


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Which examples.

    Attributes:
        source: "shapes" (rendered scenes), "digits" (scikit-learn's scanned digits), "folder" (own images with
            captions), "tfds" (any TFDS image data set), "stored" (shards of `snapgen prepare`), "new_object" (a few
            pictures of an object that the shapes world has not), "shapes_changes" (rendered scenes, each with a false
            caption beside the true one), "prompts" (a text file, one a line, without images) or "synthetic" (random
            batches of whatever shapes the recipe asks for, drawn once: a run on them shows the speed of the device
            alone).
        path: "folder" and "stored": the folder. "prompts": the file. "tfds": the data directory; empty means TFDS's
            default.
        name: "tfds": the data set, with config and version where wanted: "imagenet2012", "coco_captions/2014:1.1.0".
        train_split: "tfds": TFDS split of the training examples.
        validation_split: "tfds": TFDS split of the validation examples.
        validation_path: "folder", "stored" and "prompts": one of its own for validation, in place of a share of the
            others.
        validation_share: "digits", "folder", "stored" and "prompts": share of the examples held out for validation.
        image_feature: "tfds": feature that holds the image.
        caption_feature: "tfds": feature that holds the caption or the class label, "captions/text" for a nested one;
            empty finds it.
        class_names: "tfds": text file with one class name a line, where the data set's own names are codes. `snapgen
            draw` reads it under any source.
        captions: "folder": "needed" leaves images without a caption out; "none" takes every image, for a recipe that
            reads no text.
        shapes: the shapes data set, also that of "shapes_changes"; its size is that of the new object's pictures too.
        new_object: which object, and how many pictures.
    """

    source: SourceName = "shapes"
    path: str = ""
    name: str = ""
    train_split: str = "train"
    validation_split: str = "validation"
    validation_path: str = ""
    validation_share: float = 0.05
    image_feature: str = "image"
    caption_feature: str = ""
    class_names: str = ""
    captions: Literal["needed", "none"] = "needed"
    shapes: ShapesConfig = dataclasses.field(default_factory=ShapesConfig)
    new_object: NewObjectConfig = NewObjectConfig()

    def __post_init__(self) -> None:
        check(self, validation_share=below(1))


@dataclasses.dataclass(frozen=True)
class DomainConfig(SourceConfig):
    """One source of a mixture.

    Attributes:
        weight: its share of the examples drawn, relative to the others'.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, weight=above(0))


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Which examples, and how they become batches.

    Attributes:
        mixture: several sources in place of one, each with its weight: `({"source": "stored", "path": A, "weight": 3},
            {"source": "stored", "path": B})`. Every one is repeated for itself, so that weights hold however many
            examples each has.
        crop: which part of a training image is kept where its shape is not the bucket's; validation keeps the centre.
        flip: whether training images are mirrored at random. An image whose caption says "left" or "right" never is,
            where the batch holds tokens of that caption; and none is where the batch holds an array that cannot be
            mirrored.
        bucket_shares: {bucket: its share of the training batches}, such as `{"512x512": 3, "384x640": 1}`; relative
            weights of all buckets. Empty: by the number of examples whose shape is nearest to the bucket's.
        texts: {array of token ids: the text of the source that it is made of}; "caption" for those not named.
        tokenizer: "train" trains one on the captions of this source, else the path of a `tokenizer.json`, or of a run
            that has one.
        vocab_size: upper bound of a trained tokenizer's vocabulary.
        workers: worker processes; 0 reads in threads of the main process.
        threads: reading threads in each process.
        prefetch: batches that each process prepares ahead.
        max_unreadable_share: share of the drawn examples that may be unreadable before the run stops.
    """

    mixture: tuple[DomainConfig, ...] = ()
    crop: Crop = "random"
    flip: Flip = "none"
    bucket_shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: str = "train"
    vocab_size: int = 4096
    workers: int = 0
    threads: int = 1
    prefetch: int = 2
    max_unreadable_share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, vocab_size=at_least(1), workers=at_least(0), threads=at_least(1))
        check(self, prefetch=at_least(1), max_unreadable_share=SHARE)
        if self.mixture and (self.path or self.name):
            raise FieldError("mixture", f"stands beside path={self.path!r} and name={self.name!r}; give one of the two")
