"""Validation loss on fixed batches with fixed noise: the same question at every evaluation of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import SEED, at_least, check
from snapgen_jax.evaluation.interfaces import EvaluationResult, ValidationData

Tree = Any


@dataclasses.dataclass(frozen=True)
class ValidationLoss:
    """Averages a recipe's losses (one for each range of timesteps, say) over the first batches of the validation split.

    Attributes:
        function: `function(params, frozen, batch, key) -> {name: float [B] or scalar}`, pure. An array is averaged over
            the valid examples; a scalar counts as often as its batch has valid examples.
        batches: how many batches.
        seed: batch n is measured with noise from (seed, n), whatever the step of the run.
    """

    function: Callable[[Tree, Tree, Tree, jax.Array], dict[str, jax.Array]]
    batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, batches=at_least(1), seed=SEED)

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `validation_loss.<name>`.

        Args:
            generator: holds `params` and `frozen`, the first two arguments of the function.
            dataset: the validation split. Its arrays are whole global batches, on the host or on the mesh.

        Raises:
            ValueError: there is no validation split, or no valid example in the batches.
        """
        if dataset is None:
            raise ValueError("validation_loss measures on the validation split, and was given none")
        sums: dict[str, float] = {}
        examples = 0.0
        with contextlib.closing(iter(dataset)) as batches:  # type: ignore[type-var]  # a generator
            for index, batch in enumerate(itertools.islice(batches, self.batches)):
                number = np.int32(index)
                totals, valid = self._totals(generator.params, generator.frozen, batch.arrays, batch.valid, number)
                examples += float(valid)
                for name, total in totals.items():
                    sums[name] = sums.get(name, 0.0) + float(total)
        if not examples:
            raise ValueError(
                f"validation_loss found no valid example in the first {self.batches} batches of the validation split; "
                "is the data readable, and the split large enough for a global batch?"
            )
        return EvaluationResult({f"validation_loss.{name}": total / examples for name, total in sums.items()})

    @functools.cached_property
    def _totals(self) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]]:
        """Sums over a batch, reduced on the device, so that a batch may be spread over hosts. Compiled once."""

        def totals(
            params: Tree, frozen: Tree, arrays: Tree, valid: jax.Array, index: jax.Array
        ) -> tuple[dict[str, jax.Array], jax.Array]:
            key = jax.random.fold_in(jax.random.key(self.seed), index)
            count = jnp.sum(valid, dtype=jnp.float32)

            def total(loss: jax.Array) -> jax.Array:
                loss = loss.astype(jnp.float32)
                # `where` and not a product: the loss of an unreadable example may be anything, NaN included.
                return jnp.sum(jnp.where(valid, loss, 0.0)) if loss.ndim else loss * count

            losses = self.function(params, frozen, arrays, key)
            return {name: total(loss) for name, loss in losses.items()}, count

        return jax.jit(totals)
