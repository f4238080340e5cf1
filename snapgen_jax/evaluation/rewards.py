"""The rewards of what a generator draws, by the networks that a run of `reward_tuning` is trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from snapgen_jax.bounds import SEED, at_least, check, check_texts
from snapgen_jax.conditions import prompt_arrays
from snapgen_jax.evaluation.interfaces import EvaluationResult, ImageGenerator, ValidationData
from snapgen_jax.evaluation.outputs import draw, read_images
from snapgen_jax.evaluation.requests import requests
from snapgen_jax.generation import Generator, on_every_host

Tree = Any
_TOGETHER = 16  # images


@runtime_checkable
class Scores(Protocol):
    """A recipe that has rewards."""

    def score(self, params: Tree, frozen: Tree, batch: Tree) -> dict[str, jax.Array]:
        """`{name: [B]}` of images uint8 `[B, H, W, 3]` and token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class RewardScore:
    """Mean rewards of images, each with its own prompt.

    Attributes:
        prompts: the prompts; empty for captions of the validation split.
        count: how many captions to take where no prompts are given.
        seed: image n comes from (seed, n).
        output: which output of the generator is scored, images `uint8 [N, H, W, 3]`.
        options: options of the generator, such as `encoder_mix`.
    """

    prompts: Sequence[str] = ()
    count: int = 128
    seed: int = 0
    output: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, count=at_least(1), seed=SEED)
        check_texts(self, "prompts")

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `reward.NAME` of each reward, and `reward.total`, their weighted sum; their values for each prompt.

        Raises:
            ValueError: the run has no rewards, or there is nothing to draw.
        """
        recipe = generator.recipe if isinstance(generator, Generator) else None
        if not isinstance(generator, Generator) or not isinstance(recipe, Scores) or generator.tokenizer is None:
            raise ValueError(
                "rewards are those that a run of the recipe 'reward_tuning' is trained with, and this is none"
            )
        wanted = requests(generator, self.prompts, self.count, dataset, self.seed)
        assert wanted.prompts is not None
        images = read_images(draw(generator, wanted, seed=self.seed, options=self.options), self.output)
        arrays = {**prompt_arrays(generator.recipe, generator.tokenizer, list(wanted.prompts)), "image": images}
        frozen = with_all_frozen(generator)
        score = jax.jit(recipe.score, out_shardings=on_every_host(generator.params))
        size, parts = min(_TOGETHER, len(images)), []
        for start in range(0, len(images), size):
            rows = np.arange(start, start + size) % len(images)  # the last is filled up: one program serves
            batch = {name: array[rows] for name, array in arrays.items()}
            parts.append(jax.device_get(score(generator.params, frozen, batch)))
        names = {name: f"reward.{name}" for name in parts[0]}
        values = {
            title: np.concatenate([part[name] for part in parts])[: len(images)].astype(np.float64)
            for name, title in names.items()
        }
        return EvaluationResult({name: float(value.mean()) for name, value in values.items()}, {}, values)


def with_all_frozen(generator: Any) -> Tree:
    """The frozen networks of a run as training has them; those that drawing does without are read."""
    recipe, held = generator.recipe, generator.frozen
    if set(recipe.frozen_spec()) <= set(held):
        return held
    return {**recipe.load_frozen(generator.mesh, "train"), **held}
