"""What leaves a run of reward tuning for a phone, where more than one text encoder draws.

A mix of encoders is one unit that holds all of them and gives the weighted sum of their states. Where the original
encoder leads up to a step, it is a unit of its own and makes a second context, which the first steps of the program
name.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan, ExportUnit

Tree = Any
_CONTEXT, _BEFORE = "text", "original"


def mixed_plan(plan: ExportPlan, encoder: str, shares: Mapping[str, float]) -> ExportPlan:
    """A plan whose text encoder is the weighted sum of several.

    Args:
        plan: with one.
        encoder: its role.
        shares: `{role: share}`, which sum to one.

    Raises:
        ConfigError: the encoder is split into several units.
    """
    if sum(encoder in unit.roles for unit in plan.units) > 1:
        raise ConfigError(
            f"the text encoder {encoder!r} is split into several files, between which nothing is mixed; export with "
            "--encoder_mix=1"
        )

    def mixed(unit: ExportUnit) -> ExportUnit:
        part = None if unit.part is None else functools.partial(_parts, unit.part, encoder, tuple(shares))
        function = functools.partial(_mix, unit.function, encoder, dict(shares))
        return dataclasses.replace(unit, function=function, roles=tuple(shares), part=part)

    return dataclasses.replace(plan, units=[mixed(u) if encoder in u.roles else u for u in plan.units])


def _mix(
    encode: Callable[..., dict[str, jax.Array]], encoder: str, shares: Mapping[str, float], weights: Tree, **arrays: Any
) -> dict[str, jax.Array]:
    made = [(share, encode({encoder: weights[role]}, **arrays)) for role, share in shares.items()]

    def mixed(name: str) -> jax.Array:
        first, *others = (share * found[name] for share, found in made)
        return sum(others, first)

    return {name: value if name == "mask" else mixed(name) for name, value in made[0][1].items()}


def switched_plan(
    original: ExportPlan, tuned: ExportPlan, encoder: str, role: str, options: SamplingConfig
) -> ExportPlan:
    """A plan whose first steps attend to what the original text encoder made.

    Args:
        original: a plan with one text encoder, whatever its weights.
        tuned: the plan of the last steps.
        encoder: the role of the text encoder in `original`.
        role: of the original encoder's weights.
        options: a `RewardSamplingConfig` of a method that calls the network once a step.
    """
    names = {unit.name: f"{_BEFORE}_{unit.name}" for unit in original.units if encoder in unit.roles}

    def before(unit: ExportUnit) -> ExportUnit:
        part = None if unit.part is None else functools.partial(_parts, unit.part, encoder, (role,))
        function = functools.partial(_as, unit.function, encoder, role)
        return dataclasses.replace(unit, name=names[unit.name], function=function, roles=(role,), part=part)

    program = {name: value for name, value in tuned.program.items() if name != "shift"}  # the switch is of this grid
    contexts = program["contexts"]
    program["contexts"] = {**contexts, _BEFORE: [names.get(name, name) for name in contexts[_CONTEXT]]}
    if "null_contexts" in program:
        program["null_contexts"] = {**program["null_contexts"], _BEFORE: program["null_contexts"][_CONTEXT]}
    first = options.steps - options.last_steps  # type: ignore[attr-defined]
    program["steps"] = [{"context": _BEFORE} if i < first else {} for i in range(options.steps)]
    added = [before(unit) for unit in original.units if unit.name in names]
    return dataclasses.replace(tuned, units=[*tuned.units, *added], program=program)


def _as(encode: Callable[..., Any], encoder: str, role: str, weights: Tree, **arrays: Any) -> dict[str, jax.Array]:
    return encode({encoder: weights[role]}, **arrays)


def _parts(
    part: Callable[[Mapping[str, Tree]], dict[str, Tree]], encoder: str, roles: tuple[str, ...], weights: Tree
) -> dict[str, Tree]:
    """Of each of several encoders, what a unit of one reads."""
    return {role: part({encoder: weights[role]})[encoder] for role in roles}
