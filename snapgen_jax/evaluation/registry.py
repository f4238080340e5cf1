"""Evaluators by name: what a config or a recipe writes, and what runs."""

from __future__ import annotations

import dataclasses
import difflib
import importlib

from snapgen_jax.evaluation.interfaces import Evaluator, EvaluatorSpec

# name -> module and class, imported when asked for, so that a run pays only for what it measures.
EVALUATORS: dict[str, str] = {
    "validation_loss": "snapgen_jax.evaluation.validation_loss:ValidationLoss",
    "sample_grid": "snapgen_jax.evaluation.sample_grid:SampleGrid",
    "compositional": "snapgen_jax.evaluation.compositional:CompositionalScore",
    "frechet": "snapgen_jax.evaluation.frechet_score:FrechetScore",
    "reconstruction": "snapgen_jax.evaluation.reconstruction:Reconstruction",
    "diversity": "snapgen_jax.evaluation.frechet_score:DiversityScore",
    "clip_score": "snapgen_jax.evaluation.clip_score:ClipScore",
}

_KINDS = {bool: (bool,), int: (int,), float: (float, int), str: (str,)}  # what an option takes, by its default's type


def create(spec: EvaluatorSpec) -> Evaluator:
    """The evaluator that a spec asks for, with its options, and with the recipe's function where it takes one.

    Raises:
        ValueError: an unknown name or option, with the closest match; an option of another type than its default; a
            function that is missing or not wanted.
    """
    if spec.name not in EVALUATORS:
        raise ValueError(_unknown("evaluator", spec.name, list(EVALUATORS)))
    module, name = EVALUATORS[spec.name].split(":")
    evaluator = getattr(importlib.import_module(module), name)
    defaults = {field.name: field.default for field in dataclasses.fields(evaluator)}
    fields = set(defaults)
    takes_function = "function" in fields
    for option, value in spec.options.items():
        if option not in fields - {"function"}:
            raise ValueError(_unknown(f"option of the evaluator {spec.name!r}", option, sorted(fields - {"function"})))
        kind = type(defaults[option])
        if type(value) not in _KINDS.get(kind, (type(value),)):
            raise ValueError(f"option {option!r} of the evaluator {spec.name!r} is of {kind.__name__}, got {value!r}")
    if takes_function and spec.function is None:
        raise ValueError(
            f"the evaluator {spec.name!r} measures through a function of the recipe and got none; "
            "set EvaluatorSpec.function in the recipe's evaluators()"
        )
    if spec.function is not None and not takes_function:
        raise ValueError(f"the evaluator {spec.name!r} takes no function; remove EvaluatorSpec.function")
    return evaluator(**spec.options, **({"function": spec.function} if takes_function else {}))


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what}: {name!r}{hint} (known: {', '.join(known)})"
