"""The contract between a training method and the loop. A paper is one file under `recipes/` that fulfils it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.state import TrainState

Tree = Any
Metrics = dict[str, jax.Array]
Part = Callable[[TrainState, Tree, Tree, jax.Array], Tree]
"""`part(state, frozen, batch, key)`, with the arguments of `Recipe.update`."""


@runtime_checkable
class Recipe(Protocol):
    """One training method. Every function is pure unless it says otherwise.

    Attributes:
        config: the dataclass it was built from.
    """

    config: Any

    def batch_specs(self) -> dict[str, Tree]:
        """{bucket name: tree of ShapeDtypeStruct} of a global batch, one entry a static shape."""
        ...

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first update. Shape-evaluable; reads no file."""
        ...

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Maps an earlier run's state or weights into a fresh state. Called once, never on resume."""
        ...

    def frozen_spec(self) -> Tree:
        """Shapes of the networks that are used and not trained. Reads no file."""
        ...

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """The tree of `frozen_spec`, loaded onto the mesh. The one function here that reads files."""
        ...

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One update from one global batch. Jitted by the loop, which counts the step, and discards an update whose
        metrics are not finite. Report the gradient norm, "grad_norm" of all players together or "grad_norm/<player>" of
        each: without it the loop must look through all that is new."""
        ...

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, key: jax.Array, **options: Any
    ) -> dict[str, jax.Array]:
        """Examples from `{player: params}`. `key` is `[B]`, one an example, so that an example depends on its own key
        alone. `options` are static and default to the recipe's config."""
        ...

    def exports(self) -> ExportPlan:
        """What to convert for a phone, and the sampler that the phone runs."""
        ...

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """What to measure, and when."""
        ...

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """(regular expression over parameter paths, PartitionSpec); first match wins, no match is replicated."""
        ...


def frozen_for_generation(recipe: Recipe, mesh: Mesh | None = None) -> Tree:
    """What `recipe.generate` needs of the frozen networks.

    All of `load_frozen`, unless the recipe has a method `load_for_generation`: a teacher of eight billion parameters is
    not wanted where only the student draws.
    """
    return getattr(recipe, "load_for_generation", recipe.load_frozen)(mesh)


def parts_of(recipe: Recipe) -> Mapping[str, Part]:
    """{name: what the step does in one piece}, for plans of each piece by itself.

    None, unless the recipe has a method `parts`. A step with frozen networks of billions of parameters may be more than
    a laptop can compile at once, and their share of it is worth knowing in any case.
    """
    return getattr(recipe, "parts", dict)()
