"""The update as one program: discarded as a whole where it is not finite; lowered for a mesh, with devices or without.

`loop` runs it; `planning` compiles it for pods that are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.parallel.chips import Roofline, chip_of_kind
from snapgen_jax.parallel.mesh import batch_sharding
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.parallel.traffic import traffic
from snapgen_jax.training.keys import key
from snapgen_jax.training.ravel import gather
from snapgen_jax.training.recipe import Metrics, Recipe
from snapgen_jax.training.state import TrainState

Tree = Any


def guards(metrics: Metrics, state: TrainState) -> list[jax.Array]:
    """The numbers that tell whether an update is finite.

    A gradient norm, one for all players or one for each ("grad_norm", "grad_norm/critic"), tells of every gradient and
    of its square, before any parameter moves: XLA then decides and updates in one pass over the state. A recipe that
    reports none has its new parameters and optimizer states looked at, which costs a second pass.
    """
    numbers = list(metrics.values())
    if "grad_norm" not in metrics and not all(f"grad_norm/{name}" in metrics for name in state.players):
        numbers += jax.tree.leaves([(player.params, player.opt_state) for player in state.players.values()])
    return [x for x in numbers if jnp.issubdtype(x.dtype, jnp.floating)]


def make_step(recipe: Recipe, seed: int) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, Metrics]]:
    """The pure function that is jitted: an update, discarded as a whole if its `guards` are not all finite."""

    def step(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, Metrics]:
        new, metrics = recipe.update(state, frozen, batch, key(seed, state.step, "update"))
        finite = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in guards(metrics, new)]))
        kept = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b), (new.players, new.extra), (state.players, state.extra)
        )
        new = TrainState(state.step + 1, state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32), *kept)
        return new, {**metrics, "finite": finite}

    return step


def lower_step(recipe: Recipe, seed: int, mesh: Mesh, state: Tree, frozen: Tree, bucket: str) -> jax.stages.Lowered:
    """The step of one bucket, lowered for a mesh: what a run compiles, and what a plan compiles without a device.

    Args:
        state, frozen: arrays, or `ShapeDtypeStruct`s with shardings; the state as a step carries it, see `carried`.
        bucket: which of the recipe's batch shapes.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(make_step(recipe, seed), donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        return jitted.lower(state, frozen, _batch_spec(recipe, mesh, bucket))


def carried(state: TrainState, mesh: Mesh) -> TrainState:
    """The shapes of a state in the form in which a step carries it on a mesh: on one device with moments and averages
    as vectors, where that pays; see `training.ravel`."""
    if mesh.size > 1:
        return state
    where = jax.sharding.NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), jax.eval_shape(gather, state))


def carry(state: TrainState, mesh: Mesh) -> TrainState:
    """A state in the form in which a step carries it, see `carried`."""
    form = carried(state, mesh)
    if jax.tree.structure(form) == jax.tree.structure(state):
        return state
    return jax.jit(gather, out_shardings=jax.tree.map(lambda s: s.sharding, form))(state)


def _batch_spec(recipe: Recipe, mesh: Mesh, bucket: str) -> Tree:
    where = batch_sharding(mesh)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), recipe.batch_specs()[bucket])


def roofline(compiled: jax.stages.Compiled) -> Roofline | None:
    """The least time of a compiled step on these devices; None where their peaks are not known."""
    chip, cost = chip_of_kind(jax.devices()[0].device_kind), compiled.cost_analysis()
    if chip is None or not cost:
        return None
    found = traffic(compiled.as_text() or "")
    flops = float(cost.get("flops", 0.0)) + found.repeated_flops
    return Roofline(chip, flops, found.memory_bytes, int8_flops=found.int8_flops)


def lower_abstract_step(
    recipe: Recipe, seed: int, mesh: Mesh, bucket: str, part: str = ""
) -> tuple[jax.stages.Lowered, Tree]:
    """`lower_step` from shapes alone: no weight is read and no device touched. Returns it and the state's shapes.

    Args:
        part: one of `recipe.parts()` in place of the whole step.

    Raises:
        ValueError: the recipe has no such part.
    """
    state = jax.eval_shape(lambda: recipe.init(key(seed, 0, "init")))
    shardings = tree_shardings(state, recipe.rules(), mesh)
    frozen = recipe.frozen_spec()

    def placed(tree: Tree, places: Tree) -> Tree:
        return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree, places)

    frozen_placed = placed(frozen, tree_shardings(frozen, recipe.rules(), mesh))
    state_placed = placed(state, shardings)
    if not part:
        return lower_step(recipe, seed, mesh, carried(state_placed, mesh), frozen_placed, bucket), state
    known = recipe.parts()
    if part not in known:
        raise ValueError(f"no part {part!r} of this recipe's step; its parts are: {', '.join(known) or 'none'}")

    def run_part(state: TrainState, frozen: Tree, batch: Tree) -> Tree:
        return known[part](state, frozen, batch, key(seed, state.step, "update"))

    with jax.set_mesh(mesh):
        return jax.jit(run_part).lower(state_placed, frozen_placed, _batch_spec(recipe, mesh, bucket)), state
