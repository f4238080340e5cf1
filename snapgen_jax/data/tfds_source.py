"""Any image data set of TensorFlow Datasets, by name, read at random through `tfds.data_source`.

Class labels become captions ("a photo of a tabby cat") and the array `label`; where an image has several captions each
draw takes one. Two that are much used:

* ImageNet-1K: `name="imagenet2012"`, `validation_split="validation"`. Its class names are codes (n02123045), so point
  `class_names` at a text file with the thousand words, one a line, in label order. The archives are fetched by hand
  (https://www.tensorflow.org/datasets/catalog/imagenet2012).
* COCO captions: `name="coco_captions"`, `validation_split="val"`; five captions an image.

A data set is prepared once, before the run, in the format that can be read at random:

    tfds build coco_captions --file_format=array_record --data_dir=...
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from snapgen_jax.data.arrays import IMAGE, LABEL, TEXT, ArraySpec, Example
from snapgen_jax.data.config import SourceConfig, Split
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.images import decode
from snapgen_jax.data.sources import asked
from snapgen_jax.data.words import class_caption, pick, read_class_names

_TEXT_NAMES = ("caption", "captions", "text")  # of the Text features, ids and file names are not captions


class TfdsSource:
    """A prepared TFDS data set. The files are opened when first used, and again in every worker process."""

    def __init__(self, config: SourceConfig, split: str, held_out: bool = True):
        self._config, self._split = config, split
        self.held_out = held_out
        self._records: Any = None
        features = self._open().dataset_info.features
        self._image_path = _find_image(features, config)
        self._caption_path, feature = _find_caption(features, config)
        self._class_names = _class_names(feature, config)
        self._label_path = self._caption_path if self._class_names is not None else _find_label(features)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}

    def _open(self) -> Any:
        if self._records is None:
            self._records = _open(self._config, self._split)
        return self._records

    def __len__(self) -> int:
        return len(self._open())

    def spec(self) -> dict[str, ArraySpec]:
        """Image, caption, and `label` where the data set has classes."""
        return {"image": IMAGE, "caption": TEXT, **({"label": LABEL} if self._label_path else {})}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The decoded image at its own size, one of its captions, and its class label where it has one."""
        record = self.record(index)
        values = self._values(record)
        if not values:
            raise UnreadableExampleError("the record has no caption")
        value = pick(rng, values)
        example: Example = {"caption": self._caption(value)}
        if asked("image", names):
            example["image"] = decode(self.encoded_image(record))
        if self._label_path:
            example["label"] = np.int32(value if self._class_names is not None else _get(record, self._label_path))
        return example

    def name(self, index: int) -> str:
        """ "coco_captions train record 7"."""
        return f"{self._config.name} {self._split} record {index}"

    def sizes(self) -> None:
        """None: records do not tell their size without being read."""

    def buckets(self) -> None:
        """None."""

    def record(self, index: int) -> Any:
        """All features of an example; an image is the bytes of its file.

        Raises:
            UnreadableExampleError: it cannot be read.
        """
        try:
            return self._open()[index]
        except Exception as error:  # the reader of each file format raises its own types
            raise UnreadableExampleError(f"{type(error).__name__}: {error}") from error

    def encoded_image(self, record: Any) -> bytes:
        """The bytes of the image of a record."""
        return _get(record, self._image_path)

    def captions(self, record: Any) -> tuple[str, ...]:
        """All captions of a record, each on one line."""
        return tuple(map(self._caption, self._values(record)))

    def features(self) -> tuple[str, ...]:
        """Names of the features that stand at the top of a record."""
        return tuple(self._open().dataset_info.features)

    def _values(self, record: Any) -> list[Any]:
        return list(np.atleast_1d(_get(record, self._caption_path)))

    def _caption(self, value: Any) -> str:
        if self._class_names is not None:
            return class_caption(self._class_names[int(value)])
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        return " ".join(text.split())


def build(config: SourceConfig, split: Split) -> TfdsSource:
    """The TFDS source of a config. Raises `DataError` where it is unknown, not prepared, or has no caption."""
    if not config.name:
        raise DataError("the data source 'tfds' needs data.name, the name of a TFDS data set such as 'coco_captions'")
    if split == "train":
        return TfdsSource(config, config.train_split)
    return TfdsSource(config, config.validation_split, held_out=config.validation_split != config.train_split)


def _open(config: SourceConfig, split: str) -> Any:
    import tensorflow_datasets as tfds  # seconds to import

    try:
        return tfds.data_source(
            config.name,
            split=split,
            data_dir=config.path or None,
            download=False,
            decoders={config.image_feature: tfds.decode.SkipDecoding()},  # bytes: `images.decode` turns and converts
        )
    except Exception as error:  # TFDS raises many types
        problem = str(error).split("\nAvailable datasets")[0]  # hundreds of lines
        close = difflib.get_close_matches(config.name, tfds.list_builders(with_community_datasets=False), n=3)
        named = config.name in close or not close
        hint = "" if named else f" Perhaps you mean {' or '.join(close)}?"
        where = config.path or "the default data directory"
        raise DataError(
            f"the TFDS data set {config.name!r}, split {split!r}, cannot be read from {where}: {problem}{hint}\n"
            f"Prepare it once with: tfds build {config.name} --file_format=array_record"
            + (f" --data_dir={config.path}" if config.path else "")
        ) from error


def _leaves(feature: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (path, feature) for every leaf; a sequence counts as what it holds."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        for key, child in feature.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, path)
    else:
        yield path, feature


def _find_image(features: Any, config: SourceConfig) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    images = ["/".join(path) for path, leaf in _leaves(features) if isinstance(leaf, tfds.features.Image)]
    if config.image_feature not in images:
        raise DataError(
            f"{config.name!r} has no image feature {config.image_feature!r}; it has {', '.join(images) or 'none'}"
        )
    return (config.image_feature,)


def _find_caption(features: Any, config: SourceConfig) -> tuple[tuple[str, ...], Any]:
    import tensorflow_datasets as tfds

    leaves = list(_leaves(features))
    if config.caption_feature:
        found = [(path, leaf) for path, leaf in leaves if "/".join(path) == config.caption_feature]
    else:
        texts = [(p, f) for p, f in leaves if isinstance(f, tfds.features.Text) and p[-1] in _TEXT_NAMES]
        labels = [(p, f) for p, f in leaves if isinstance(f, tfds.features.ClassLabel)]
        found = texts + sorted(labels, key=lambda item: item[0] != ("label",))
    if not found:
        raise DataError(
            f"{config.name!r} has no caption {config.caption_feature or 'text or class label'!r}; set "
            f"data.caption_feature to one of its features: {', '.join(sorted('/'.join(path) for path, _ in leaves))}"
        )
    return found[0]


def _find_label(features: Any) -> tuple[str, ...]:
    """The class label beside a caption: the feature `label`, or else the first class label; () where there is none."""
    import tensorflow_datasets as tfds

    labels = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    return (min(labels, key=lambda name: name != "label"),) if labels else ()


def _class_names(feature: Any, config: SourceConfig) -> list[str] | None:
    """The words of a class label by number; None for a feature that is text."""
    import tensorflow_datasets as tfds

    if not isinstance(feature, tfds.features.ClassLabel):
        return None
    if not config.class_names:
        return list(feature.names)
    names = read_class_names(config.class_names)
    if len(names) != feature.num_classes:
        raise DataError(
            f"data.class_names: {len(names)} names for the {feature.num_classes} classes of {config.name!r}"
        )
    return names


def _get(record: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        record = record[key]
    return record
