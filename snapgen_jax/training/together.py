"""Several runs of one recipe that differ in their seeds, trained as one program.

A small network leaves most of a large accelerator idle; several side by side share its time. Each run draws its own
parameters, batches and noise, as it does by itself, and so learns the same to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.training import keys, progress
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.loop import PlainBatch
from snapgen_jax.training.recipe import Metrics, Part, Recipe, Use
from snapgen_jax.training.state import Player, TrainState

Tree = Any


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of several of the same shapes, with a first axis that counts them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _as_leaves(players: dict[str, Player]) -> dict[str, Player]:
    """Players that a step does not carry as vectors, where the axis of runs would be lost."""
    return {name: player.replace(elementwise=False) for name, player in players.items()}


class Together:
    """Recipes side by side. Every array of players, `extra` and frozen networks has a first axis that counts the runs;
    a batch is theirs one after the other. Implements what `training.recipe.Recipe` asks of training.

    If one run's update is not finite, that of all is discarded.
    """

    def __init__(self, recipes: Sequence[Recipe], seeds: Sequence[int]):
        """`recipes` differ in nothing but the runs that they read frozen networks from; `seeds` are those of the runs.

        Raises:
            ValueError: they do not all take batches of one shape.
        """
        specs = recipes[0].batch_specs()
        if len(specs) > 1 or any(recipe.batch_specs() != specs for recipe in recipes):
            raise ValueError("runs that are trained together must take batches of one shape; give all one image size")
        first = recipes[0]
        self.config, self.inputs, self.trains, self.options = first.config, first.inputs, first.trains, first.options
        self.recipes = tuple(recipes)
        self.seeds = np.array(seeds, np.int32)

    @property
    def recipe(self) -> Recipe:
        """The one that computes for all."""
        return self.recipes[0]

    def batch_specs(self) -> dict[str, Tree]:
        """Those of one run, as many times longer as there are runs."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((len(self.seeds) * s.shape[0], *s.shape[1:]), s.dtype),
            self.recipe.batch_specs(),
        )

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of one run."""
        return self.recipe.tokenizers()

    def conditions(self) -> tuple[str, ...]:
        """Those of one run."""
        return self.recipe.conditions()

    def init(self, key: jax.Array) -> TrainState:
        """Every run as it begins by itself, from the key of its own seed."""
        del key
        states = jax.vmap(lambda seed: self.recipe.init(keys.key(seed, 0, "init")))(self.seeds)
        return TrainState(jnp.int32(0), jnp.int32(0), _as_leaves(states.players), states.extra)

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Every run from its own earlier one, of stacked `{player: weights}`."""

        def one(players: Tree, extra: Tree, earlier: Tree) -> tuple[Tree, Tree]:
            new = self.recipe.warm_start(TrainState(state.step, state.skipped, players, extra), earlier)
            return new.players, new.extra

        players, extra = jax.vmap(one)(state.players, state.extra, earlier)
        return state.replace(players=_as_leaves(players), extra=extra)

    def frozen_spec(self) -> Tree:
        """That of one run with the axis of runs."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((len(self.seeds), *s.shape), s.dtype), self.recipe.frozen_spec()
        )

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """What each run reads."""
        return stack([recipe.load_frozen(mesh, use) for recipe in self.recipes])

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """Those of every run, with the axis of runs."""
        return jax.vmap(self.recipe.weights)(params, frozen)

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One update of each run, with the key that it has by itself; metrics are means over the runs."""
        del key
        batches = jax.tree.map(lambda x: x.reshape(len(self.seeds), -1, *x.shape[1:]), batch)

        def one(players: Tree, extra: Tree, frozen: Tree, batch: Tree, seed: jax.Array) -> tuple[Tree, Tree, Metrics]:
            before = TrainState(state.step, state.skipped, players, extra)
            new, metrics = self.recipe.update(before, frozen, batch, keys.key(seed, state.step, "update"))
            return new.players, new.extra, metrics

        players, extra, metrics = jax.vmap(one)(state.players, state.extra, frozen, batches, jnp.asarray(self.seeds))
        return state.replace(players=players, extra=extra), jax.tree.map(lambda x: x.mean(axis=0), metrics)

    def part(self, state: TrainState, i: int) -> TrainState:
        """The state of one run, as it would be by itself."""
        parts = [x[i] for x in jax.tree.leaves((state.players, state.extra))]
        players, extra = jax.tree.unflatten(self._of_one_run, parts)
        return state.replace(players=players, extra=extra)

    @functools.cached_property
    def _of_one_run(self) -> Any:
        """The structure of players and `extra` of a run by itself."""
        alone = jax.eval_shape(self.recipe.init, keys.key(0, 0, "init"))
        return jax.tree.structure((alone.players, alone.extra))

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """None: every device holds all runs."""
        return []

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """None: a run is measured by itself."""
        return []

    def parts(self) -> Mapping[str, Part]:
        """None: a step is planned by itself."""
        return {}

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: Any
    ) -> dict[str, jax.Array]:
        """Not asked of several runs at once.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("runs that were trained together draw one by one; load each from its own workdir")

    def codec(self, params: Tree, frozen: Tree) -> Any:
        """Not asked of several runs at once.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("runs that were trained together code one by one; load each from its own workdir")

    def exports(self) -> ExportPlan:
        """Not asked of several runs at once.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("runs that were trained together are exported one by one; export each from its own workdir")


@dataclasses.dataclass(frozen=True)
class JoinedBatches:
    """The streams of several runs as one. Implements `loop.Batches`.

    Attributes:
        streams: of batches of a single shape.
    """

    streams: Sequence[Any]

    def batches(self, position: int) -> Iterator[PlainBatch]:
        """From global batch `position` of each on: one batch of every run, one after the other."""
        iterators = [stream.batches(position) for stream in self.streams]
        try:
            for parts in zip(*iterators, strict=True):
                arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
                index = np.concatenate([part.source_index for part in parts])
                yield PlainBatch(parts[0].bucket, arrays, index)
        finally:
            for iterator in iterators:
                progress.close(iterator)
