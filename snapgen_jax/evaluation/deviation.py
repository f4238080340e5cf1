"""How far a cheaper way of sampling leads from the full one, with the same noise and conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.bounds import SEED, at_least, check
from snapgen_jax.evaluation.interfaces import EvaluationResult, ImageGenerator, ValidationData
from snapgen_jax.evaluation.outputs import draw, read_images
from snapgen_jax.evaluation.requests import requests


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Compares images with those of the same generator under other options, pixel by pixel.

    Attributes:
        reference: options of the full way of sampling, such as `{"lazy": 0.0}`; what is not named is as in `options`.
        prompts: to draw; by default captions of the validation split.
        examples: how many captions or examples, where there are no prompts.
        seed: image n comes from (seed, n) both ways.
        output: which output of the generator is compared, images `uint8 [N, H, W, 3]`.
        options: options of the way that is measured.
    """

    reference: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompts: Sequence[str] = ()
    examples: int = 64
    seed: int = 0
    output: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, seed=SEED, examples=at_least(1))

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """`deviation.grey_levels`: the root of the mean squared difference of pixels, in levels of 255; its value for
        each image.

        Raises:
            ValueError: there is nothing to draw, or no images by the name of `output`.
        """
        wanted = requests(generator, self.prompts, self.examples, dataset, self.seed)
        both = [
            read_images(draw(generator, wanted, seed=self.seed, options=options), self.output).astype(np.float64)
            for options in (self.options, {**self.options, **self.reference})
        ]
        errors = np.sqrt(np.mean(np.square(both[0] - both[1]), axis=(1, 2, 3)))
        name = "deviation.grey_levels"
        return EvaluationResult({name: float(errors.mean())}, {}, {name: errors})
