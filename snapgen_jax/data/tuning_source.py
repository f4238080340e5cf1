"""A few examples of something new, taking turns with examples of what a network knows: what adapters learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from snapgen_jax.data.arrays import IMAGE, TEXT, ArraySpec, Example
from snapgen_jax.data.config import DataConfig, Split, TuningConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.shapes import COLOURS, Group, Scene, SceneObject, render
from snapgen_jax.data.shapes_captions import caption
from snapgen_jax.data.shapes_grammar import GAP, MAX_SIZE, MIN_SIZE
from snapgen_jax.data.sources import Source, asked, build_source

PRIOR = ArraySpec("array", (), np.float32, "same")
SHOWN_COLOURS = tuple(COLOURS)[:6]  # of the new object; in the others it is asked for without having been shown
_STREAM: dict[Split, int] = {"train": 0x0BEC, "validation": 0x0BED}
_VALIDATION_EXAMPLES = 64


class NewObjects:
    """Rendered pictures of one object of a kind that the shapes world has not, each alone and of a known colour.

    Validation shows others than training.
    """

    held_out = True

    def __init__(self, config: TuningConfig, size: int, split: Split):
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
        return Scene((SceneObject(config.new, colour, size, x, y),), (said,), "single_object")

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
        """None: a scene goes to any bucket."""


class TuningSource:
    """Even examples are new and odd ones are prior; each of the fewer comes several times in an epoch."""

    def __init__(self, new: Source, prior: Source | None):
        self._new, self._prior, self.held_out = new, prior, new.held_out

    def __len__(self) -> int:
        return len(self._new) if self._prior is None else 2 * max(len(self._new), len(self._prior))

    def _at(self, index: int) -> tuple[Source, int]:
        if self._prior is None:
            return self._new, index
        source = self._prior if index % 2 else self._new
        return source, (index // 2) % len(source)

    def spec(self) -> dict[str, ArraySpec]:
        """What both have, and "prior"."""
        known = self._new.spec() if self._prior is None else self._prior.spec()
        return {**{name: spec for name, spec in self._new.spec().items() if name in known}, "prior": PRIOR}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The example of its source; `prior` is 1 for one of what the network knows, else 0."""
        source, place = self._at(index)
        declared = self.spec()
        found = {name: x for name, x in source.example(place, rng, names).items() if name in declared}
        return {**found, "prior": np.float32(source is not self._new)}

    def name(self, index: int) -> str:
        """That of its source."""
        source, place = self._at(index)
        return source.name(place)

    def sizes(self) -> np.ndarray | None:
        """Those of both sources; None where one has none."""
        new, prior = self._new.sizes(), None if self._prior is None else self._prior.sizes()
        if self._prior is None or new is None or prior is None:
            return new if self._prior is None else None
        places = np.arange(len(self)) // 2
        return np.where(np.arange(len(self))[:, None] % 2, prior[places % len(prior)], new[places % len(new)])


def build(config: DataConfig, split: Split) -> TuningSource:
    """The source of a config.

    Raises:
        DataError: the new examples or the prior are not where the config says.
    """
    tuning = config.tuning
    if tuning.new == "folder":
        new: Source = build_source(dataclasses.replace(config, source="folder"), split)
    elif config.path:
        raise DataError(f"data.path is {config.path!r} and data.tuning.new={tuning.new!r} renders; set new='folder'")
    else:
        new = NewObjects(tuning, config.shapes.size, split)
    if tuning.prior == "none":
        return TuningSource(new, None)
    if tuning.prior == "folder" and not tuning.prior_path:
        raise DataError("data.tuning.prior='folder' needs data.tuning.prior_path; `snapgen adapters prior` writes one")
    return TuningSource(
        new, build_source(dataclasses.replace(config, source=tuning.prior, path=tuning.prior_path), split)
    )
