"""The draws of images with captions never change: a resumed run sees the crops, flips and phrasings of before."""

import hashlib
import itertools
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.pipeline import Pipeline
from snapgen_jax.data.tokenizer import train
from tests.data.conftest import specs

LETTERS = train(["a"], 259)  # a token a byte: ids are the caption itself
TEXT = ("tokens", "mask")


def _fingerprint(config: DataConfig, buckets, count: int, **options) -> str:
    """A hash of the first batches: buckets, indices, flags and every array."""
    digest = hashlib.sha256()
    batches = Pipeline(config, buckets, LETTERS, seed=7, **options).batches(2)
    for batch in itertools.islice(batches, count):
        digest.update(batch.bucket.encode())
        for array in (batch.source_index, batch.valid, *(batch.arrays[name] for name in sorted(batch.arrays))):
            digest.update(f"{array.dtype.name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    batches.close()
    return digest.hexdigest()[:16]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> DataConfig:
    """Twelve pictures of noise in three shapes, two captions each; one is damaged."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        height, width = ((40, 60), (60, 40), (48, 48))[number % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{number:02}.png")
        rows.append({"file_name": f"{number:02}.png", "text": [f"picture {number}", f"number {number}, again"]})
    (tmp_path / "05.png").write_bytes(b"no picture")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source="folder", path=str(tmp_path), flip="random", max_unreadable_share=0.5)


def test_shapes_say_the_same_words_in_the_same_order() -> None:
    # Words alone: the last bit of a rendered picture may differ between processors.
    text = {name: specs(16, length=48)[name] for name in TEXT}
    assert _fingerprint(DataConfig(), {"text": text}, 4) == "7ea8ae4d9687f28b"


def test_captions_beside_pictures_are_the_captions_alone() -> None:
    both = Pipeline(DataConfig(), {"32x32": specs(16, 32, 32, 48)}, LETTERS, seed=7).batches(2)
    alone = {name: specs(16, length=48)[name] for name in TEXT}
    words = Pipeline(DataConfig(), {"32x32": alone}, LETTERS, seed=7).batches(2)
    np.testing.assert_array_equal(next(both).arrays["tokens"], next(words).arrays["tokens"])


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((8, 8), {}, "97991603ee3a0a79"),
        ((16, 12), {}, "d7a10f9759c83fc4"),
        ((16, 12), {"split": "validation"}, "fa9d1230df5a6aa1"),
    ],
)
def test_digits_are_cropped_and_mirrored_as_before(size, options, expected: str) -> None:
    config = DataConfig(source="digits", crop="random", flip="random")
    assert _fingerprint(config, {"a": specs(64, *size, 32)}, 6, **options) == expected


def test_a_folder_is_cropped_mirrored_and_said_as_before(folder: DataConfig) -> None:
    assert _fingerprint(folder, {"32x32": specs(4, 32, 32, 24)}, 8) == "dfb08ea1a231d1fa"  # of Pillow 12


def test_pictures_without_captions_are_cropped_and_mirrored_as_before(folder: DataConfig) -> None:
    assert _fingerprint(folder, {"32x32": {"image": specs(4, 32, 32)["image"]}}, 8) == "a3d9d64691231829"


def test_the_buckets_of_a_folder_come_in_the_same_order(folder: DataConfig) -> None:
    buckets = {"16x24": specs(4, 16, 24, 24), "24x16": specs(2, 24, 16, 24), "16x16": specs(4, 16, 16, 24)}
    assert _fingerprint(folder, buckets, 12) == "897f6f0634ba826b"
