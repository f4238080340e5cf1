"""The contract between a training method and the loop. A paper is one file under `recipes/` that fulfils it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.inputs.interfaces import Inputs, TokenizerSpec
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.state import TrainState

Tree = Any
Metrics = dict[str, jax.Array]
Part = Callable[[TrainState, Tree, Tree, jax.Array], Tree]
"""`part(state, frozen, batch, key)`, with the arguments of `Recipe.update`."""
Use = Literal["train", "generate"]


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a recipe whose `generate` leaves nothing to choose."""


@runtime_checkable
class Recipe(Protocol):
    """One training method. Every function is pure unless it says otherwise.

    Attributes:
        config: the dataclass it was built from.
        inputs: what it is fed.
        trains: `{player: roles}`, the networks that each player holds; every other network of `weights` is frozen.
        options: a frozen dataclass, how `generate` works unless a call says otherwise. The command line offers its
            fields (`--steps`, `--guidance`).
    """

    config: Any
    inputs: Inputs
    trains: Mapping[str, tuple[str, ...]]
    options: Any

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """`{bucket: {array: ShapeDtypeStruct}}` of a global batch, one entry a static shape: of its inputs, and of what
        else it reads."""
        ...

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """`{array of token ids: its tokenizer}`, of all inputs."""
        ...

    def conditions(self) -> tuple[str, ...]:
        """The arrays that `generate` takes as conditions."""
        ...

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first update. Shape-evaluable; reads no file."""
        ...

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Maps an earlier run's state or weights into a fresh state. Called once, never on resume."""
        ...

    def frozen_spec(self) -> Tree:
        """`{role: shapes}` of the networks that are used and not trained. Reads no file."""
        ...

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """The tree of `frozen_spec`, loaded onto the mesh; to "generate", without what only training needs, such as a
        teacher. The one function here that reads files."""
        ...

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """`{role: parameters}` of `{player: parameters}` and the frozen networks: the one place where they meet, and
        where trained trees are transformed (merged adapters, fake quantisation). Frozen roles that were not loaded are
        left out."""
        ...

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One update from one global batch. Jitted by the loop, which counts the step, and discards an update whose
        metrics are not finite. Report the gradient norm, "grad_norm" of all players together or "grad_norm/<player>" of
        each: without it the loop must look through all that is new."""
        ...

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: Any
    ) -> dict[str, jax.Array]:
        """Examples from `{player: parameters}`.

        Args:
            params, frozen: as for `weights`.
            conditions: arrays of `conditions()`, `[B, ...]`.
            keys: `[B]`, one an example, so that an example depends on its own key alone.
            options: of the type of the attribute `options`; static.
        """
        ...

    def codec(self, params: Tree, frozen: Tree) -> Any:
        """The `networks.codec.Codec` that its images go through, or that it trains.

        Raises:
            ConfigError: there is none; says what to do instead.
        """
        ...

    def parts(self) -> Mapping[str, Part]:
        """{name: what the step does in one piece}, for plans of each piece by itself: a step with frozen networks of
        billions of parameters may be more than a laptop can compile at once."""
        ...

    def exports(self) -> ExportPlan:
        """What to convert for a phone, and the program that the phone runs.

        Raises:
            ConfigError: it cannot be exported; says what to do instead.
        """
        ...

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """What to measure, and when."""
        ...

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """(regular expression over parameter paths, PartitionSpec); first match wins, no match is replicated."""
        ...
