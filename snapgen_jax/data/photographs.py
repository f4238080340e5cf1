"""A folder of captioned photographs to try things on: crops of those that scikit-image and scikit-learn ship."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image

CAPTIONS = {
    "astronaut": ("an astronaut in an orange suit", "a smiling woman before a flag and a model of a shuttle"),
    "chelsea": ("a cat with green eyes", "the face of a tabby cat"),
    "coffee": ("a cup of coffee on a wooden table", "coffee in a red cup, with a spoon"),
    "rocket": ("a rocket on its launch pad at night", "a white rocket between towers"),
    "retina": ("the retina of an eye", "blood vessels of an orange retina"),
    "hubble_deep_field": ("galaxies in a dark sky", "the Hubble deep field"),
    "china": ("a Chinese temple below a blue sky", "a palace with red walls"),
    "flower": ("a large orange flower", "a dahlia before green leaves"),
}
_LEAST = 96  # pixels along a side of a crop
_OF_SKLEARN = ("china", "flower")


def write_photographs(folder: pathlib.Path, count: int = 64, seed: int = 0) -> None:
    """Writes `photo_007.jpg` and beside it `photo_007.txt`, one caption: crops of eight photographs, in many shapes.

    Args:
        folder: made where it is missing; files of these names are written over.
        count: how many.
        seed: of the crops and captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = sorted(CAPTIONS)
    photographs = {name: _photograph(name) for name in names}
    for number in range(count):
        name = names[number % len(names)]
        photograph = photographs[name]
        width, height = (int(rng.integers(_LEAST, min(side, 5 * _LEAST) + 1)) for side in photograph.size)
        sizes = zip(photograph.size, (width, height), strict=True)
        left, top = (int(rng.integers(side - part + 1)) for side, part in sizes)
        path = folder / f"photo_{number:03d}.jpg"
        photograph.crop((left, top, left + width, top + height)).save(path, quality=92)
        path.with_suffix(".txt").write_text(CAPTIONS[name][int(rng.integers(len(CAPTIONS[name])))] + "\n")


def _photograph(name: str) -> Image.Image:
    if name in _OF_SKLEARN:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
