"""Plans: what a config's step needs and costs on chips that are not here."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath

from snapgen_jax.config import Resolved
from snapgen_jax.parallel.mesh import check_batch, make_mesh
from snapgen_jax.parallel.plan import Plan, plan_step, topology
from snapgen_jax.training import step
from snapgen_jax.training.exits import ConfigError


def plan(resolved: Resolved, name: str, part: str = "") -> list[Plan]:
    """What a config's step needs and costs on chips that are not here: one plan for each batch shape.

    Args:
        resolved: the experiment.
        name: of the topology, "v5e:4x4"; see `parallel.plan.topology`.
        part: a piece of the step to plan by itself, see `Recipe.parts`; "" for the whole.

    Raises:
        ConfigError: the topology is unknown, the mesh or the batch does not fit it, or there is no such part.
    """
    experiment, recipe = resolved.experiment, resolved.start("tpu")
    try:
        where = topology(name)
        mesh = make_mesh(experiment.mesh, where.devices)
        plans = []
        for bucket, spec in recipe.batch_specs().items():
            batch = jax.tree.leaves(spec)[0].shape[0]
            check_batch(batch, experiment.microbatches, mesh)
            lowered, state = step.lower_abstract_step(recipe, experiment.seed, mesh, bucket, part)
            facts = {"part": part, "bucket": bucket, "global_batch": batch, "train_steps": experiment.train_steps}
            plans.append(plan_step(lowered, where, mesh, state=state, **facts))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return plans


def derive(earlier: epath.Path, name: str) -> tuple[dict[str, Any], list[Plan]]:
    """What earlier plans say of another topology, see `Plan.on`; with the config and overrides that they were made of.

    Raises:
        ConfigError: the topology is unknown, or the file holds no plans, or plans that tell nothing of others.
    """
    try:
        records = json.loads(earlier.read_text())
        asked = {what: records[0][what] for what in ("config", "overrides")}
        plans = [Plan.from_json(record) for record in records]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{earlier}: {error!r}; give a file that `snapgen plan --json` wrote") from error
    try:
        where = topology(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return asked, [found.on(where) for found in plans]
    except ValueError as error:
        raise ConfigError(f"{earlier}: {error}") from error
