"""The same prompts from the same noise, as one picture: progress that a person can see."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from snapgen_jax.evaluation.fixed_prompts import fixed_prompts
from snapgen_jax.evaluation.interfaces import EvaluationResult, Generator, ValidationData
from snapgen_jax.evaluation.pictures import grid


@dataclasses.dataclass(frozen=True)
class SampleGrid:
    """Draws one image for each of a few fixed prompts.

    Attributes:
        prompts: the prompts, in reading order; empty for captions of the validation split.
        count: how many captions to take where no prompts are given.
        seed: image n comes from (seed, n), whatever the step of the run.
        columns: images in a row.
        options: options of the generator, such as `steps` and `guidance`.
    """

    prompts: tuple[str, ...] = ()
    count: int = 16
    seed: int = 0
    columns: int = 8
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, generator: Generator, dataset: ValidationData | None = None) -> EvaluationResult:
        """The picture `samples`; no number."""
        prompts = fixed_prompts(self.prompts, self.count, dataset, self.seed)
        images = generator.generate(prompts, seed=self.seed, **self.options)
        return EvaluationResult({}, {"samples": grid(images, prompts, columns=self.columns)})
