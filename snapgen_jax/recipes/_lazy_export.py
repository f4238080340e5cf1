"""What leaves a run of gates for a phone: a denoiser in which a static schedule says what runs, or the gates do.

By a schedule there is a graph for each distinct mask, all in one file that holds the weights once. What a graph uses
again is an input of it, and what it leaves for the next step an output; the sampler carries both as the program's
state, once for each half of guidance. Which graph a step calls is plain data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.recipes._gates import ROLE, input_of, logit, threshold
from snapgen_jax.training.exports import Branches, ExportPlan, ExportUnit

Tree = Any
LARGE = 6e4  # beyond any logit, and within float16


def scheduled_plan(plan: ExportPlan, modules: Sequence[str], masks: np.ndarray, spec: Tree) -> ExportPlan:
    """A plan whose denoiser skips by a schedule.

    Args:
        plan: of the network without gates; its first unit is the denoiser, made by `denoiser_unit`.
        modules: that can be skipped, in the order in which they run.
        masks: bool `[T, modules]`, true where a module runs; `T` as the plan's times.
        spec: shapes of the weights, `{role: parameters}`.

    Returns:
        The plan with a unit for each distinct mask. The one in which all modules run keeps the denoiser's name; the
        others are numbered in the order of their first step.
    """
    dense, *others = plan.units
    next_reuses = np.append(~masks[1:], np.zeros_like(masks[:1]), axis=0)
    distinct, first, which = np.unique(masks, axis=0, return_index=True, return_inverse=True)
    which, order = which.reshape(-1), np.argsort(first)
    shapes = module_shapes(dense, modules, spec)
    names, units = {}, []
    for place, number in enumerate(order):
        names[number] = dense.name if place == 0 else f"{dense.name}_{place}"
        mask, steps = distinct[number], which == number
        left = mask & next_reuses[steps].any(axis=0)
        keeps = tuple(module for module, kept in zip(modules, left, strict=True) if kept)
        cached = {module: shapes[module] for module, runs in zip(modules, mask, strict=True) if not runs}
        function = functools.partial(dense.function, keeps=keeps) if keeps else dense.function
        inputs = {**dense.inputs, **cached}
        units.append(dataclasses.replace(dense, name=names[number], function=function, inputs=inputs, file=dense.name))
    reused = [module for module, runs in zip(modules, masks.T, strict=True) if not runs.all()]
    program = {name: part for name, part in plan.program.items() if name != "shift"}  # the grid is the schedule's
    program["steps"] = [{} if names[number] == dense.name else {"unit": names[number]} for number in which]
    program["state"] = {
        module: {"shape": list(shapes[module].shape[1:]), "dtype": "float32", "initial": "zeros"} for module in reused
    }
    return dataclasses.replace(plan, units=[*units, *others], program=program)


def module_shapes(dense: ExportUnit, modules: Sequence[str], spec: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """`{module: shape of its output}` in a call of a denoiser; `spec` as for `scheduled_plan`."""
    keep_all = functools.partial(dense.function, keeps=tuple(modules))
    made = jax.eval_shape(keep_all, {role: spec[role] for role in dense.roles}, **dense.inputs)
    return {module: made[module] for module in modules}


# --- gates that decide on the phone ----------------------------------------------------------------------------------


def adaptive_plan(
    plan: ExportPlan, modules: Sequence[str], may_skip: np.ndarray, share: float | None, spec: Tree
) -> ExportPlan:
    """A plan whose denoiser asks its gates at each call: one graph with an IF for each module, for CPUs.

    Args:
        plan, modules, spec: as for `scheduled_plan`.
        may_skip: bool `[T]`, the steps at which the gates decide.
        share: of the module calls to skip, see `threshold`.
    """
    dense, *others = plan.units
    (role,) = dense.roles
    shapes = module_shapes(dense, modules, spec)
    function = Branches(
        tuple(modules),
        functools.partial(_decide, dense.function, tuple(modules)),
        functools.partial(_module, dense.function, dict(dense.inputs)),
        functools.partial(_finish, dense.function),
    )
    unit = dataclasses.replace(
        dense,
        function=function,
        roles=(role, ROLE),
        inputs={**dense.inputs, "step": jax.ShapeDtypeStruct((1, len(may_skip)), np.float32), **shapes},
        part=functools.partial(_tables, role, tuple(modules), may_skip, share),
    )
    program = {name: part for name, part in plan.program.items() if name != "shift"}  # the grid is that of the gates
    program["steps"] = [{"arrays": {"step": row}} for row in np.eye(len(may_skip)).tolist()]
    program["state"] = {
        module: {"shape": list(shape.shape[1:]), "dtype": "float32", "initial": "zeros"}
        for module, shape in shapes.items()
    }
    return dataclasses.replace(plan, units=[unit, *others], program=program)


def _tables(
    role: str, modules: Sequence[str], may_skip: np.ndarray, share: float | None, weights: Mapping[str, Tree]
) -> dict[str, Tree]:
    """The denoiser's weights, and the gates as tables of a row for each step: kernels `[T, sum of D]`, the modules'
    side by side, and limits `[T, modules]`, the logits below which they are skipped."""
    gates = weights[ROLE]
    limit = np.clip(np.asarray(threshold(gates, modules, may_skip, share)), -LARGE, LARGE)
    kernels = np.concatenate([np.asarray(gates[module]["kernel"]) for module in modules], axis=1)
    limits = np.repeat(np.where(may_skip, limit, -1.0)[:, None], len(modules), axis=1)
    return {
        role: weights[role],
        ROLE: {"kernels": (kernels * may_skip[:, None]).astype(np.float32), "limits": limits.astype(np.float32)},
    }


def _decide(
    denoise: Callable[..., Tree], modules: Sequence[str], name: str, weights: Tree, values: Tree, inputs: Tree
) -> tuple[jax.Array, jax.Array]:
    """Whether a module runs, bool [], and what enters it, at batch 1. Ties run, and so does what is not a number."""
    own = {key: value for key, value in inputs.items() if key not in (*modules, "step")}
    entering = denoise(weights, **own, **values, keeps=(input_of(name),))[input_of(name)]
    place, width = modules.index(name), entering.shape[-1]
    gates = weights[ROLE]
    before = sum(values[module].shape[-1] for module in modules[:place])
    kernel = (inputs["step"] @ gates["kernels"][:, before : before + width])[0]
    limit = jnp.sum(inputs["step"][0] * gates["limits"][:, place])
    return jnp.logical_not(logit(kernel, entering)[0] < limit), entering


def _module(denoise: Callable[..., Tree], own: Tree, name: str, weights: Tree, entering: jax.Array) -> jax.Array:
    """A module alone: what the network leads there is replaced by what enters it, and not computed."""
    nothing = {key: jnp.zeros(spec.shape, spec.dtype) for key, spec in own.items()}
    return denoise(weights, **nothing, **{input_of(name): entering}, keeps=(name,))[name]


def _finish(denoise: Callable[..., Tree], weights: Tree, values: Tree, inputs: Tree) -> dict[str, jax.Array]:
    """The prediction, and what each module gave or was replaced by."""
    own = {key: value for key, value in inputs.items() if key not in values and key != "step"}
    return {**denoise(weights, **own, **values), **values}
