"""A few rendered pictures of an object that no scene of the shapes world has, with a new word for it."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from snapgen_jax.data.arrays import IMAGE, TEXT, ArraySpec, Example
from snapgen_jax.data.config import NewObjectConfig, SourceConfig, Split
from snapgen_jax.data.shapes import COLOURS, Group, Scene, SceneObject, render
from snapgen_jax.data.shapes_captions import caption
from snapgen_jax.data.shapes_grammar import GAP, MAX_SIZE, MIN_SIZE
from snapgen_jax.data.sources import asked

SHOWN_COLOURS = tuple(COLOURS)[:6]  # of the new object; in the others it is asked for without having been shown
_STREAM: dict[Split, int] = {"train": 0x0BEC, "validation": 0x0BED}
_VALIDATION_EXAMPLES = 64


class NewObjects:
    """Rendered pictures of one object of a kind that the shapes world has not, each alone and of a known colour.

    Validation shows others than training.
    """

    held_out = True

    def __init__(self, config: NewObjectConfig, size: int, split: Split):
        self._config, self._size = config, size
        self._stream = _STREAM[split]
        self._length = config.examples if split == "train" else _VALIDATION_EXAMPLES

    def __len__(self) -> int:
        return self._length

    def scene(self, index: int) -> Scene:
        """The scene behind an example; its caption says the new word."""
        config = self._config
        rng = np.random.default_rng((self._stream, config.seed, index))
        size = rng.uniform(MIN_SIZE, MAX_SIZE[1])
        x, y = rng.uniform(size / 2 + GAP / 2, 1 - size / 2 - GAP / 2, 2)
        colour = SHOWN_COLOURS[index % len(SHOWN_COLOURS)]
        said = Group(config.word, colour=colour if index % 2 else None)
        return Scene((SceneObject(config.kind, colour, size, x, y),), (said,), "single_object")

    def spec(self) -> dict[str, ArraySpec]:
        """Image and caption."""
        return {"image": IMAGE, "caption": TEXT}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The rendered scene `[size, size, 3]`, and one of its phrasings: "a moon", "a photo of a red moon"."""
        scene = self.scene(index)
        image = {"image": render(scene, self._size)} if asked("image", names) else {}
        return {**image, "caption": caption(scene, rng)}

    def name(self, index: int) -> str:
        """ "new object 7"."""
        return f"new object {index}"

    def sizes(self) -> None:
        """None: a picture goes to any bucket."""

    def buckets(self) -> None:
        """None: a picture goes to any bucket."""


def build(config: SourceConfig, split: Split) -> NewObjects:
    """The new object of a config."""
    return NewObjects(config.new_object, config.shapes.size, split)
