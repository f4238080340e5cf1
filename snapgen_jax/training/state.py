"""What a training step carries: players, counters, and the recipe's own arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Player:
    """One parameter tree under one optimizer. It may hold several networks (UNet and text encoder, say).

    Attributes:
        params: nested dict of float32 arrays.
        opt_state: the state of its optax optimizer.
        ema: the exponential moving average of `params`, or None where the recipe keeps none.
        elementwise: whether the optimizer treats every number by itself, see `training.optimizer.Elementwise`.
    """

    params: Tree
    opt_state: Tree
    ema: Tree | None = None
    elementwise: bool = dataclasses.field(default=False, metadata={"static": True})

    def replace(self, **changes: Any) -> Self:
        """A copy with fields replaced."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run. Everything in it is an array; it is checkpointed whole and restored bit for bit.

    Attributes:
        step: int32 scalar, updates attempted, equal to the number of global batches used.
        skipped: int32 scalar, updates that were discarded because a number in them was not finite.
        players: {name: Player}.
        extra: the recipe's own checkpointed arrays (running means, cadence counters).
    """

    step: jax.Array
    skipped: jax.Array
    players: dict[str, Player]
    extra: Tree

    def replace(self, **changes: Any) -> TrainState:
        """A copy with fields replaced."""
        return dataclasses.replace(self, **changes)
