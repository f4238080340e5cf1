"""Whether a network draws an object that it learnt later, from a few images, when its new word is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from snapgen_jax.bounds import SEED, check
from snapgen_jax.data.prompts import Demand, Requirement
from snapgen_jax.data.shapes import COLOURS, KINDS, UNSEEN_KINDS
from snapgen_jax.data.words import article
from snapgen_jax.evaluation.detector import DetectorConfig, detect
from snapgen_jax.evaluation.interfaces import EvaluationResult, ImageGenerator, ValidationData
from snapgen_jax.evaluation.outputs import draw, read_images
from snapgen_jax.evaluation.pictures import grid
from snapgen_jax.evaluation.requests import Requests
from snapgen_jax.evaluation.statistics import wilson_interval

PHRASES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "there is {}")


@dataclasses.dataclass(frozen=True)
class NewObjectScore:
    """Draws one image for each of 54 prompts, "a moon" and "a photo of a red moon", and counts those that show that
    object alone, in the colour that is named.

    Attributes:
        kind: what must be seen, one of `data.shapes.UNSEEN_KINDS`.
        word: what the prompts call it.
        seed: image n comes from (seed, n).
        output: which output of the generator is judged, images `uint8 [N, H, W, 3]`.
        options: options of the generator, such as `steps` and `guidance`.
    """

    kind: str = "moon"
    word: str = "moon"
    seed: int = 0
    output: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, seed=SEED)
        if self.kind not in UNSEEN_KINDS:
            raise ValueError(f"kind is {self.kind!r}; choose from {', '.join(UNSEEN_KINDS)}")

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """`new_object.score`, the share of passes, with `.low` and `.high`; `.shape`, the share in which the colour may
        be another; and the picture `new_object`.

        Raises:
            ValueError: the generator takes no prompts, or gives no images by that name.
        """
        del dataset
        asked = [(phrase, colour) for colour in (None, *COLOURS) for phrase in PHRASES]
        texts = [phrase.format(self._noun(colour)) for phrase, colour in asked]
        outputs = draw(generator, Requests.of_prompts(texts), seed=self.seed, options=self.options)
        images = read_images(outputs, self.output)
        found = [detect(image, DetectorConfig(kinds=(*KINDS, self.kind))) for image in images]
        shape = [Requirement((Demand(self.kind),)).met_by(objects) for objects in found]
        passed = [
            Requirement((Demand(self.kind, 1, colour),)).met_by(objects)
            for (_, colour), objects in zip(asked, found, strict=True)
        ]
        low, high = wilson_interval(sum(passed), len(passed))
        name = "new_object.score"
        numbers = {name: float(np.mean(passed)), f"{name}.low": low, f"{name}.high": high}
        numbers["new_object.shape"] = float(np.mean(shape))
        return EvaluationResult(
            numbers, {"new_object": grid(images, texts, passed)}, {name: np.array(passed, np.float64)}
        )

    def _noun(self, colour: str | None) -> str:
        words = [word for word in (colour, self.word) if word]
        return " ".join([article(words[0]), *words])
