"""Real photographs, as they come with scikit-learn and scikit-image, in a folder with captions."""

import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data.pipeline import Batch


def specs(batch: int, height: int = 16, width: int = 16, length: int = 12) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch specs of an image recipe."""
    return {
        "image": jax.ShapeDtypeStruct((batch, height, width, 3), np.uint8),
        "tokens": jax.ShapeDtypeStruct((batch, length), np.int32),
        "mask": jax.ShapeDtypeStruct((batch, length), np.float32),
    }


def assert_equal_batches(a: Sequence[Batch], b: Sequence[Batch]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.bucket == right.bucket
        np.testing.assert_array_equal(left.source_index, right.source_index)
        np.testing.assert_array_equal(left.valid, right.valid)
        assert left.arrays.keys() == right.arrays.keys()
        for name, array in left.arrays.items():
            np.testing.assert_array_equal(array, right.arrays[name], err_msg=name)


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """{caption: photograph}; four of landscape shape, two square, all in colour but the camera man."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    arrays = {
        "a chinese temple with a golden roof": temple,
        "a pink flower": flower,
        "a cat looking into the camera": skimage.data.chelsea(),
        "a cup of coffee on a wooden table": skimage.data.coffee(),
        "an astronaut in an orange suit": skimage.data.astronaut(),
        "a man with a camera on a tripod": skimage.data.camera(),
    }
    return {caption: Image.fromarray(array) for caption, array in arrays.items()}


@pytest.fixture
def photo_folder(tmp_path: pathlib.Path, photographs: dict[str, Image.Image]) -> pathlib.Path:
    """The photographs as JPEG files with a `metadata.jsonl`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for number, (caption, image) in enumerate(photographs.items()):
        image.save(folder / f"{number}.jpg", quality=90)
        rows.append({"file_name": f"{number}.jpg", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
