"""CLIP score: how well images fit their prompts, in the eyes of a contrastive run (Hessel et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from snapgen_jax.evaluation.fixed_prompts import fixed_prompts
from snapgen_jax.evaluation.interfaces import EvaluationResult, ValidationData
from snapgen_jax.generation import Generator, load, prompt_arrays


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """Mean cosine between the embeddings of an image and of its prompt.

    Attributes:
        workdir: a run of the recipe `contrastive`; "" for the one whose text encoder the generator's run reads.
        prompts: the prompts; empty for captions of the validation split.
        count: how many captions to take where no prompts are given.
        seed: image n comes from (seed, n).
        options: options of the generator.
    """

    workdir: str = ""
    prompts: tuple[str, ...] = ()
    count: int = 128
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `clip.score`, and `clip.chance`: the same with each image beside the prompt of the next.

        Raises:
            ValueError: there is no contrastive run, or nothing to draw.
        """
        workdir = self.workdir or getattr(generator.recipe.config, "text_workdir", "")
        if not workdir:
            raise ValueError(
                "clip_score needs a run of the recipe 'contrastive': name it in the option `workdir`, or train with "
                "its text encoder (text_workdir)"
            )
        prompts = fixed_prompts(self.prompts, self.count, dataset, self.seed)
        images = generator.generate(prompts, seed=self.seed, **self.options)
        image, text = embeddings(load(workdir), images, prompts)
        return EvaluationResult(
            {
                "clip.score": float(np.mean(np.sum(image * text, axis=1))),
                "clip.chance": float(np.mean(np.sum(image * np.roll(text, 1, axis=0), axis=1))),
            }
        )


def embeddings(clip: Generator, images: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors `[N, D]` of images `uint8 [N, H, W, 3]` and of their prompts, by a contrastive run."""
    assert clip.tokenizer is not None
    conditions = {"image": images, **prompt_arrays(clip.recipe, clip.tokenizer, list(prompts))}
    found = jax.jit(clip.recipe.generate)(clip.params, clip.frozen, conditions, jax.random.key(0))
    return np.asarray(found["image"]), np.asarray(found["text"])
