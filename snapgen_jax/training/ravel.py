"""A tree of many small arrays as a few long ones, for arithmetic that treats every number alike.

An update of an optimizer is a few operations a number. Over hundreds of small arrays what it costs is to start an
operation for each of them; over one vector it costs the reading of the numbers (`python -m benchmarks.update`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.training.state import Player, TrainState

Tree = Any
# {"dtype": {name of the last key of a path: a vector}}
Vectors = dict[str, dict[str, jax.Array]]

# Above this many numbers a leaf, reading them is what an update costs, and the copies into vectors do not pay.
LARGEST_MEAN_LEAF = 2**16


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which leaf lies where in the vectors. Leaves that share the last key of their path and their dtype share a
    vector, so that a rule by that key, such as a mask of weight decay, holds for vectors as it does for leaves.

    Attributes:
        structure: of the tree.
        shapes: of its leaves.
        groups: {(dtype, last key): numbers of the leaves}.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    groups: dict[tuple[str, str], tuple[int, ...]]

    @classmethod
    def of(cls, tree: Tree) -> Layout:
        """That of a tree of nested dicts."""
        found, structure = jax.tree_util.tree_flatten_with_path(tree)
        groups: dict[tuple[str, str], list[int]] = {}
        for i, (path, leaf) in enumerate(found):
            groups.setdefault((str(leaf.dtype), path[-1].key), []).append(i)
        shapes = tuple(leaf.shape for _, leaf in found)
        return cls(structure, shapes, {group: tuple(members) for group, members in groups.items()})

    @property
    def pays(self) -> bool:
        """Whether the leaves are many and small enough."""
        return sum(map(math.prod, self.shapes)) <= LARGEST_MEAN_LEAF * len(self.shapes)

    def ravel(self, tree: Tree) -> Vectors:
        """A tree of this structure, of any dtypes, as vectors."""
        leaves, vectors = self.structure.flatten_up_to(tree), {}
        for (dtype, name), members in self.groups.items():
            vectors.setdefault(dtype, {})[name] = jnp.concatenate([leaves[i].ravel() for i in members])
        return vectors

    def unravel(self, vectors: Vectors) -> Tree:
        """The tree that `ravel` took."""
        leaves: list[Any] = [None] * len(self.shapes)
        for (dtype, name), members in self.groups.items():
            start = 0
            for i in members:
                stop = start + math.prod(self.shapes[i])
                leaves[i] = vectors[dtype][name][start:stop].reshape(self.shapes[i])
                start = stop
        return self.structure.unflatten(leaves)

    def ravel_all(self, tree: Tree) -> Tree:
        """Every part of a tree that has this structure, such as the moments in an optimizer's state, as vectors."""
        return jax.tree.map(lambda part: self.ravel(part) if self._fits(part) else part, tree, is_leaf=self._fits)

    def unravel_all(self, tree: Tree) -> Tree:
        """What `ravel_all` took."""
        keys = {dtype: {name for kind, name in self.groups if kind == dtype} for dtype, _ in self.groups}

        def raveled(part: Any) -> bool:
            return isinstance(part, dict) and {k: set(v) for k, v in part.items() if isinstance(v, dict)} == keys

        return jax.tree.map(lambda part: self.unravel(part) if raveled(part) else part, tree, is_leaf=raveled)

    def _fits(self, part: Any) -> bool:
        return isinstance(part, dict) and jax.tree.structure(part) == self.structure


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RavelledPlayer(Player):
    """A player whose moments and average are vectors, as its `Layout` says; its parameters are as they were."""


def gather(state: TrainState) -> TrainState:
    """The state with the moments and averages of those players as vectors whose optimizer is elementwise, and whose
    arrays are many and small. Traceable."""
    return state.replace(players={name: _gathered(player) for name, player in state.players.items()})


def leaf_by_leaf(state: TrainState) -> TrainState:
    """The state as before `gather`."""
    return _scatter(state) if any(isinstance(p, RavelledPlayer) for p in state.players.values()) else state


@jax.jit
def _scatter(state: TrainState) -> TrainState:
    return state.replace(players={name: _scattered(player) for name, player in state.players.items()})


def _gathered(player: Player) -> Player:
    if not player.elementwise:
        return player
    layout = Layout.of(player.params)
    if not layout.pays:
        return player
    ema = None if player.ema is None else layout.ravel(player.ema)
    return RavelledPlayer(player.params, layout.ravel_all(player.opt_state), ema, elementwise=True)


def _scattered(player: Player) -> Player:
    if not isinstance(player, RavelledPlayer):
        return player
    layout = Layout.of(player.params)
    ema = None if player.ema is None else layout.unravel(player.ema)
    return Player(player.params, layout.unravel_all(player.opt_state), ema, elementwise=True)
