"""The prompts of evaluators that may ask for anything: those of the config, or captions of the validation split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from snapgen_jax.evaluation.interfaces import ValidationData


def captions(dataset: ValidationData, indices: Iterable[int], seed: int) -> list[str]:
    """Captions of examples of the validation split, each in the phrasing that (seed, index) draws."""
    draws = [(int(index), np.random.default_rng((seed, int(index)))) for index in indices]
    return [dataset.source.example(index, rng, ("caption",))["caption"] for index, rng in draws]


def fixed_prompts(prompts: Sequence[str], count: int, dataset: ValidationData | None, seed: int) -> list[str]:
    """The prompts given, or else the captions of the first `count` examples of the validation split.

    Raises:
        ValueError: there are neither prompts nor a validation split.
    """
    if prompts:
        return list(prompts)
    if dataset is None:
        raise ValueError(
            "there is nothing to draw: list some texts in the option `prompts`, or give a validation split"
        )
    return captions(dataset, range(min(count, len(dataset.source))), seed)
