"""The numbers of one way to draw from a trained run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims.claim import Metric
from benchmarks.claims.trials import Budget, Draw
from snapgen_jax.scoring import measure

OF_PROMPTS = ("compositional", "new_object")
DEVIATIONS = 128  # images whose deviation is measured: pairs of the same noise differ little


def score(
    folder: pathlib.Path, draw: Draw, budget: Budget, batch_size: int, generator: Any, metrics: Mapping[str, Metric]
) -> dict[str, Any]:
    """The metrics of a run as floats, and as NAME.each those of the prompts.

    Evaluators of prompts draw each one several times, and its number is the mean: images of one prompt are no
    sample of prompts. The other evaluators run once.
    """
    if callable(options := draw.options):
        raise ValueError("options that are a function of the seed; ask for those of one by Draw.of")
    generator = draw.wrap(generator) if draw.wrap else generator
    found, categories = [], draw.categories or budget.categories
    for seed in range(min(draw.images or budget.images, budget.images)):
        names = [name for name in draw.evaluators if seed == 0 or name in OF_PROMPTS]
        asked = {
            "compositional": {"per_category": budget.per_category, "categories": categories, "seed": seed},
            "new_object": {"seed": seed},
            "frechet": {"examples": budget.examples},
            "deviation": {"examples": min(budget.examples, DEVIATIONS), "reference": draw.reference},
        }
        generation = {**options, "batch_size": batch_size}
        found += [measure(folder, names, generation=generation, options=asked, generator=generator)] if names else []
    numbers: dict[str, Any] = {}
    for key in metrics:
        if values := [float(one.numbers[key]) for one in found if key in one.numbers]:
            numbers[key] = round(float(np.mean(values)), 6)
        if each := [np.asarray(one.values[key], float) for one in found if key in one.values]:
            numbers[f"{key}.each"] = np.mean(each, 0).round(4).tolist()
    return numbers


class PermutedCaptions:
    """A generator that draws each prompt's image for another prompt. Its score is what captions do not give."""

    def __init__(self, generator: Any):
        self.recipe = generator.recipe
        self._generator = generator

    def generate(self, prompts: Sequence[str], **options: Any) -> np.ndarray:
        """As `Generator.generate`, with the prompts of the other half of the list."""
        return self._generator.generate(list(np.roll(prompts, len(prompts) // 2)), **options)
