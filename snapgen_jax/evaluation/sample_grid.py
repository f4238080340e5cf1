"""The same prompts or conditions from the same noise, as one picture: progress that a person can see."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from snapgen_jax.bounds import SEED, at_least, check, check_texts
from snapgen_jax.evaluation.interfaces import EvaluationResult, ImageGenerator, ValidationData
from snapgen_jax.evaluation.outputs import described, draw, read
from snapgen_jax.evaluation.pictures import as_pictures, grid
from snapgen_jax.evaluation.requests import requests


@dataclasses.dataclass(frozen=True)
class SampleGrid:
    """Draws one image, clip or map for each of a few fixed prompts or examples.

    Attributes:
        prompts: the prompts, in reading order; empty for captions of the validation split. A run that takes no prompts
            draws from the labels, images or text states of the split.
        count: how many examples of the split to take where no prompts are given.
        seed: image n comes from (seed, n), whatever the step of the run.
        columns: images in a row; clips have a row each.
        output: which output of the generator is shown; see `pictures.as_pictures`.
        options: options of the generator, such as `steps` and `guidance`.
    """

    prompts: tuple[str, ...] = ()
    count: int = 16
    seed: int = 0
    columns: int = 8
    output: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, count=at_least(1), seed=SEED, columns=at_least(1))
        check_texts(self, "prompts")

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """The picture `samples`; no number.

        Raises:
            ValueError: there is nothing to draw from, or the output is missing or cannot be shown.
        """
        wanted = requests(generator, self.prompts, self.count, dataset, self.seed)
        outputs = draw(generator, wanted, seed=self.seed, options=self.options)
        array = read(outputs, self.output)
        try:
            pictures = as_pictures(array)
        except ValueError as error:
            raise ValueError(
                f"the output {self.output!r}: {error}; the generator gives {described(outputs)}"
            ) from error
        columns = 1 if array.ndim == 5 else self.columns
        return EvaluationResult({}, {"samples": grid(pictures, wanted.titles, columns=columns)})
