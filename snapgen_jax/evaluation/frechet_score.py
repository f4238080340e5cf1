"""Two evaluators on fixed image features: distance to real images, and difference between seeds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from snapgen_jax.evaluation.diversity import pairwise_distances
from snapgen_jax.evaluation.features import image_features
from snapgen_jax.evaluation.fixed_prompts import captions, fixed_prompts
from snapgen_jax.evaluation.frechet import frechet_distance
from snapgen_jax.evaluation.interfaces import EvaluationResult, Generator, ValidationData
from snapgen_jax.evaluation.statistics import mean_interval


@dataclasses.dataclass(frozen=True)
class FrechetScore:
    """Frechet distance between generated images and real ones of the validation split.

    Attributes:
        examples: how many generated images meet as many real ones; half of the split, where that is less.
        seed: image n comes from (seed, n).
        options: options of the generator.
    """

    examples: int = 512
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, generator: Generator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `frechet.distance`, and `frechet.real`: what real images in place of the generated ones would score.

        The captions of one half of the real images are drawn, and compared with the other half, as the first half is
        for `frechet.real`.

        Raises:
            ValueError: there is no validation split, or it has fewer than four readable images.
        """
        if dataset is None:
            raise ValueError("frechet compares with images of the validation split, and was given none")
        images, indices = self._real(dataset)
        count = len(images) // 2
        if count < 2:
            raise ValueError(f"frechet needs four readable validation images or more and found {len(images)}")
        prompts = captions(dataset, indices[:count], self.seed)
        drawn = image_features(generator.generate(prompts, seed=self.seed, **self.options))
        first, second = image_features(images[:count]), image_features(images[count : 2 * count])
        return EvaluationResult(
            {"frechet.distance": frechet_distance(drawn, second), "frechet.real": frechet_distance(first, second)}
        )

    def _real(self, dataset: ValidationData) -> tuple[np.ndarray, list[int]]:
        """Up to twice `examples` different images of one size, with their indices."""
        found: dict[int, np.ndarray] = {}
        bucket = None
        with contextlib.closing(iter(dataset)) as batches:  # type: ignore[type-var]  # a generator
            for batch in batches:
                bucket = bucket or batch.bucket
                if batch.bucket != bucket:
                    continue
                before, seen_again = len(found), False
                for index, valid, image in zip(batch.source_index, batch.valid, batch.arrays["image"], strict=True):
                    seen_again |= int(index) in found
                    if valid:
                        found.setdefault(int(index), np.asarray(image))
                if len(found) >= 2 * self.examples or seen_again or len(found) == before:
                    break
        indices = list(found)[: 2 * self.examples]
        return np.stack([found[i] for i in indices]) if indices else np.empty((0, 0, 0, 3), np.uint8), indices


@dataclasses.dataclass(frozen=True)
class DiversityScore:
    """How much the images of one prompt differ from seed to seed.

    Attributes:
        prompts: the prompts; empty for captions of the validation split.
        count: how many captions to take where no prompts are given.
        images: drawn for each prompt.
        seed: image s of prompt p comes from (seed, p * images + s).
        options: options of the generator.
    """

    prompts: tuple[str, ...] = ()
    count: int = 32
    images: int = 4
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, generator: Generator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Number `diversity.pairwise`: mean feature distance over pairs of images of a prompt, then over prompts; with
        its 95% interval over two prompts or more as `.low` and `.high`."""
        prompts = fixed_prompts(self.prompts, self.count, dataset, self.seed)
        repeated = [prompt for prompt in prompts for _ in range(self.images)]
        features = image_features(generator.generate(repeated, seed=self.seed, **self.options))
        distances = pairwise_distances(features.reshape(len(prompts), self.images, -1))
        numbers = {"diversity.pairwise": float(distances.mean())}
        if len(prompts) > 1:
            numbers["diversity.pairwise.low"], numbers["diversity.pairwise.high"] = mean_interval(distances)
        return EvaluationResult(numbers, values={"diversity.pairwise": distances})
