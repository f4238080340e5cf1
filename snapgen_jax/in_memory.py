"""Training without a workdir: a recipe on any iterable of batches, in a notebook say."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from snapgen_jax.training import loop
from snapgen_jax.training.loop import LoopConfig, PlainBatch
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.state import TrainState

Tree = Any


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Any iterable of `{name: array}` as batches; the bucket is found by shape."""

    iterable: Iterable[Mapping[str, Any]]
    specs: dict[str, Tree]

    def batches(self, position: int) -> Iterator[PlainBatch]:
        for n, arrays in enumerate(itertools.islice(iter(self.iterable), position, None)):
            arrays = {name: np.asarray(x) for name, x in arrays.items()}
            shapes = {name: x.shape for name, x in arrays.items()}
            fits = [b for b, spec in self.specs.items() if {k: s.shape for k, s in spec.items()} == shapes]
            size = len(next(iter(arrays.values())))
            yield PlainBatch(fits[0] if fits else next(iter(self.specs)), arrays, np.arange(n * size, (n + 1) * size))


def train(
    recipe: Recipe, batches: Iterable[Mapping[str, Any]], steps: int, *, seed: int = 0, quiet: bool = False
) -> TrainState:
    """Trains a recipe in memory, in a notebook say: no workdir, no flags.

    Args:
        recipe: any recipe.
        batches: `{name: array}` dicts with the shapes of `recipe.batch_specs()`.
        steps: updates.
        seed: of the run.
        quiet: prints nothing.

    Returns:
        The last state; `inference_weights(state)` are the weights that `recipe.generate` takes.
    """
    config = LoopConfig(seed=seed, train_steps=steps, log_every_steps=max(1, min(50, steps // 4)))
    return loop.train(recipe, _Stream(batches, recipe.batch_specs()), config, quiet=quiet)
