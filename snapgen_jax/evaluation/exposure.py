"""The exposure gap of a few-step generator: how much farther from its teacher it is on its own samples than on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from snapgen_jax.bounds import SEED, at_least, check
from snapgen_jax.evaluation.interfaces import EvaluationResult, ValidationData
from snapgen_jax.evaluation.validation_loss import ValidationLoss

Tree = Any
NOISED, OWN = "noised/", "own/"
FIRST = "t=1.00"


@dataclasses.dataclass(frozen=True)
class Exposure:
    """Compares the generator's jump to the data with its teacher's, on noised data and on its own samples.

    Training without own samples sees the first alone, sampling the second at every time but the first (Ning et al.
    2023, "Input perturbation reduces exposure bias in diffusion models").

    Attributes:
        function: `function(params, frozen, batch, key) -> {"noised/t=0.90": [B], "own/t=0.90": [B]}` for each time.
        batches: how many batches of the validation split.
        seed: of the noise.
    """

    function: Callable[[Tree, Tree, Tree, jax.Array], dict[str, jax.Array]]
    batches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, batches=at_least(1), seed=SEED)

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `exposure.noised/t=0.90` and `exposure.own/t=0.90` for each time, and `exposure.gap`: the mean over
        the times of `own / noised`, without t = 1, where there is nothing but noise in either.

        Raises:
            ValueError: there is no validation split, or the generator has a single step.
        """
        if dataset is None:
            raise ValueError("exposure measures on the validation split, and was given none")
        measured = ValidationLoss(self.function, self.batches, self.seed)(generator, dataset).numbers
        found = {name.removeprefix("validation_loss."): value for name, value in measured.items()}
        times = [name.removeprefix(OWN) for name in found if name.startswith(OWN) and name != OWN + FIRST]
        if not times:
            raise ValueError("exposure compares the steps after the first, and this generator has one step alone")
        gap = sum(found[OWN + time] / found[NOISED + time] for time in times) / len(times)
        return EvaluationResult({**{f"exposure.{name}": value for name, value in found.items()}, "exposure.gap": gap})
