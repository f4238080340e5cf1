"""How well a network tells true captions from false ones, by what the false ones change."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from snapgen_jax.bounds import SEED, at_least, check, check_texts
from snapgen_jax.evaluation.interfaces import EvaluationResult, ValidationData

Tree = Any
CHANGED = "changed"


@dataclasses.dataclass(frozen=True)
class MatchingAccuracy:
    """Counts right answers over the first batches of the validation split.

    Attributes:
        function: `function(params, frozen, batch, key) -> {name: [B]}` of the recipe `matching`: `loss`, the booleans
            `true`, `false` and `ranked`, and `changed` where the data say what a false caption changes.
        changes: what the numbers of `changed` mean, in order.
        batches: how many batches.
        seed: of the key that the function is given.
    """

    function: Callable[[Tree, Tree, Tree, jax.Array], dict[str, jax.Array]]
    changes: tuple[str, ...] = ()
    batches: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, batches=at_least(1), seed=SEED)
        check_texts(self, "changes")

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `matching.loss`; `matching.accuracy`, the share of captions that are judged rightly at p = 1/2, and
        of it `matching.true` and `matching.false`; `matching.ranked`, how often the true caption of an image is the
        more probable; and `.CHANGE` of accuracy and ranked, of the images whose false caption makes that change.

        Raises:
            ValueError: there is no validation split, it has no valid example, or `changed` has a number without a name.
        """
        if dataset is None:
            raise ValueError("matching measures on the validation split, and was given none")
        parts: list[dict[str, np.ndarray]] = []
        with contextlib.closing(iter(dataset)) as batches:  # type: ignore[type-var]  # a generator
            for index, batch in enumerate(itertools.islice(batches, self.batches)):
                key = jax.random.fold_in(jax.random.key(self.seed), index)
                found = jax.device_get(self._judge(generator.params, generator.frozen, batch.arrays, key))
                valid = np.asarray(batch.valid)
                parts.append({name: np.asarray(values)[valid] for name, values in found.items()})
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not len(found["loss"]):
            raise ValueError(
                f"matching found no valid example in the first {self.batches} batches of the validation split; is the "
                "data readable, and the split large enough for a global batch?"
            )
        right = 0.5 * (found["true"].astype(float) + found["false"])
        numbers = {
            "matching.loss": found["loss"].mean(),
            "matching.accuracy": right.mean(),
            **{f"matching.{name}": found[name].mean() for name in ("true", "false", "ranked")},
        }
        if CHANGED in found:
            changed = found[CHANGED]
            if (largest := int(changed.max())) >= len(self.changes):
                raise ValueError(
                    f"the data's array {CHANGED!r} has the number {largest}, and changes={self.changes} has no name "
                    "for it; set `changes` of the config to a name for each number"
                )
            for number, name in enumerate(self.changes):
                if (rows := changed == number).any():
                    numbers[f"matching.accuracy.{name}"] = right[rows].mean()
                    numbers[f"matching.ranked.{name}"] = found["ranked"][rows].mean()
        return EvaluationResult({name: float(value) for name, value in numbers.items()})

    @functools.cached_property
    def _judge(self) -> Callable[..., dict[str, jax.Array]]:
        """The function, compiled once."""
        return jax.jit(self.function)
