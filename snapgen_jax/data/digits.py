"""scikit-learn's scanned handwritten digits (1797 images of 8x8 grey levels, in its wheel), with captions."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from snapgen_jax.data.arrays import IMAGE, LABEL, TEXT, ArraySpec, Example
from snapgen_jax.data.config import SourceConfig, Split
from snapgen_jax.data.sources import hold_out, holds_out
from snapgen_jax.data.words import article, pick

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PHRASES = ("a photo of {an} {word}", "a handwritten {word}", "the digit {word}", "the number {digit}", "{an} {word}")


class DigitsSource:
    """Handwritten digits: white on black, 8x8."""

    held_out = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, numbers: np.ndarray):
        """Takes uint8 images `[N, 8, 8]`, labels `[N]`, and the numbers that scikit-learn gives these images `[N]`."""
        self._images, self._labels, self._numbers = images, labels, numbers

    def __len__(self) -> int:
        return len(self._images)

    def spec(self) -> dict[str, ArraySpec]:
        """Image, caption, and the digit itself as `label`."""
        return {"image": IMAGE, "caption": TEXT, "label": LABEL}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The scan `[8, 8, 3]`, one phrasing of its label, and the label."""
        digit = int(self._labels[index])
        caption = pick(rng, _PHRASES).format(an=article(WORDS[digit]), word=WORDS[digit], digit=digit)
        image = np.repeat(self._images[index, :, :, None], 3, axis=2)
        return {"image": image, "caption": caption, "label": np.int32(digit)}

    def name(self, index: int) -> str:
        """ "digit image 7", numbered as scikit-learn does."""
        return f"digit image {self._numbers[index]}"

    def sizes(self) -> None:
        """None: all are equally small, and go to any bucket."""

    def buckets(self) -> None:
        """None."""


def build(config: SourceConfig, split: Split) -> DigitsSource:
    """The digits source of a config."""
    from sklearn.datasets import load_digits  # scipy and all of scikit-learn: only where used

    pixels, labels = load_digits(return_X_y=True)  # [N, 64] in 0..16, [N]
    images = np.rint(np.reshape(pixels, (-1, 8, 8)) * (255.0 / 16.0)).astype(np.uint8)
    chosen = hold_out(len(images), split, config.validation_share)
    source = DigitsSource(images[chosen], np.asarray(labels)[chosen], chosen)
    source.held_out = split == "train" or holds_out(len(images), config.validation_share)
    return source
