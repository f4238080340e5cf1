"""The shapes world as a data source: a scene from its index alone, its phrasing from the draw."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from snapgen_jax.data.arrays import IMAGE, TEXT, ArraySpec, Example
from snapgen_jax.data.config import SourceConfig, Split
from snapgen_jax.data.shapes import Scene, render
from snapgen_jax.data.shapes_captions import DENSE_OBJECTS, caption, dense, layout
from snapgen_jax.data.shapes_grammar import ShapesConfig, sample_scene
from snapgen_jax.data.sources import asked

Writer = Callable[[Scene, np.random.Generator], str]
# First word of the seed of a scene, so that no training scene is a validation scene.
_STREAM: dict[Split, int] = {"train": 0x5EED, "validation": 0x7E57}


class ShapesSource:
    """Rendered scenes with captions. Both splits show seen combinations only; `prompts` makes the held-out ones."""

    held_out = True  # no training scene is a validation scene

    def __init__(self, config: ShapesConfig, split: Split):
        self._config = config
        self._stream = _STREAM[split]
        self._length = config.train_examples if split == "train" else config.validation_examples

    def __len__(self) -> int:
        return self._length

    def scene(self, index: int) -> Scene:
        """The scene behind an example."""
        return sample_scene(np.random.default_rng((self._stream, index)), "seen", self._config)

    def spec(self) -> dict[str, ArraySpec]:
        """Image and caption."""
        return {"image": IMAGE, "caption": TEXT}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The rendered scene `[size, size, 3]`, and one of its phrasings."""
        scene = self.scene(index)
        return {**self.picture(scene, names), "caption": self.writer(scene, rng)(scene, rng)}

    def picture(self, scene: Scene, names: Collection[str] | None = None) -> Example:
        """`{"image": ...}`, the rendered scene; nothing where `names` do not list it."""
        return {"image": render(scene, self._config.size)} if asked("image", names) else {}

    def writer(self, scene: Scene, rng: np.random.Generator) -> Writer:
        """What makes the caption of a scene: `layout`, `dense` or `caption`."""
        if self._config.captions == "layout":
            return lambda scene, _: layout(scene)
        share = self._config.dense_share if len(scene.objects) <= DENSE_OBJECTS else 0.0
        return dense if share and rng.random() < share else caption

    def name(self, index: int) -> str:
        """ "shapes scene 7"."""
        return f"shapes scene {index}"

    def sizes(self) -> None:
        """None: a scene goes to any bucket."""

    def buckets(self) -> None:
        """None."""


def build(config: SourceConfig, split: Split) -> ShapesSource:
    """The shapes source of a config."""
    return ShapesSource(config.shapes, split)
