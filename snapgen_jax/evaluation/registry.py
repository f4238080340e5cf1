"""Evaluators by name: what a config or a recipe writes, and what runs."""

from __future__ import annotations

import importlib
import typing

from snapgen_jax.bounds import FieldError
from snapgen_jax.evaluation.interfaces import Evaluator, EvaluatorSpec
from snapgen_jax.typed import closest, coerce

# name -> module and class, imported when asked for, so that a run pays only for what it measures.
EVALUATORS: dict[str, str] = {
    "validation_loss": "snapgen_jax.evaluation.validation_loss:ValidationLoss",
    "sample_grid": "snapgen_jax.evaluation.sample_grid:SampleGrid",
    "compositional": "snapgen_jax.evaluation.compositional:CompositionalScore",
    "new_object": "snapgen_jax.evaluation.new_object:NewObjectScore",
    "frechet": "snapgen_jax.evaluation.frechet_score:FrechetScore",
    "joint_frechet": "snapgen_jax.evaluation.frechet_score:JointFrechetScore",
    "reconstruction": "snapgen_jax.evaluation.reconstruction:Reconstruction",
    "diversity": "snapgen_jax.evaluation.frechet_score:DiversityScore",
    "exposure": "snapgen_jax.evaluation.exposure:Exposure",
    "clip_score": "snapgen_jax.evaluation.clip_score:ClipScore",
    "deviation": "snapgen_jax.evaluation.deviation:Deviation",
    "matching": "snapgen_jax.evaluation.matching:MatchingAccuracy",
    "similarity": "snapgen_jax.evaluation.similarity:Similarity",
    "rewards": "snapgen_jax.evaluation.rewards:RewardScore",
    "unchanged": "snapgen_jax.evaluation.unchanged:Unchanged",
}


def takes_function(name: str) -> bool:
    """Whether an evaluator measures through a function of the recipe; False of an unknown one."""
    return name in EVALUATORS and "function" in typing.get_type_hints(_class(name))


def _class(name: str) -> typing.Any:
    module, found = EVALUATORS[name].split(":")
    return getattr(importlib.import_module(module), found)


def create(spec: EvaluatorSpec) -> Evaluator:
    """The evaluator that a spec asks for, with its options, and with the recipe's function where it takes one.

    Raises:
        ValueError: an unknown name or option, with the closest match; an option of another type; a
            function that is missing or not wanted.
    """
    if spec.name not in EVALUATORS:
        raise ValueError(f"unknown evaluator {spec.name!r}{closest(spec.name, EVALUATORS)}")
    evaluator = _class(spec.name)
    hints = typing.get_type_hints(evaluator)
    takes_function = hints.pop("function", None) is not None
    what = f"option of the evaluator {spec.name!r}"
    for option in spec.options:
        if option not in hints:
            raise ValueError(f"unknown {what} {option!r}{closest(option, hints)}")
    options = {option: coerce(value, hints[option], option, what) for option, value in spec.options.items()}
    if takes_function and spec.function is None:
        raise ValueError(
            f"the evaluator {spec.name!r} measures through a function of the recipe and got none; "
            "set EvaluatorSpec.function in the recipe's evaluators()"
        )
    if spec.function is not None and not takes_function:
        raise ValueError(f"the evaluator {spec.name!r} takes no function; remove EvaluatorSpec.function")
    try:
        return evaluator(**options, **({"function": spec.function} if takes_function else {}))
    except FieldError as error:
        raise ValueError(f"{what} {error.field!r} {error.reason}") from error
