"""The precisions of `snapgen export` on the command line: which, how they are judged, and what `mixed` may cost."""

from __future__ import annotations

import argparse
from typing import Any

from snapgen_jax.bounds import FieldError
from snapgen_jax.training.exits import ConfigError


def add_precisions(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("precisions of the weights")
    group.add_argument(
        "--precisions",
        metavar="NAMES",
        help="of f32, f16, int8 (eight bits, a scale a channel) and mixed (four bits where they do no harm), with "
        "commas: all of them, or an error (default: the first three, without those that are not good enough)",
    )
    group.add_argument(
        "--packed",
        action="store_true",
        help="ship int8's files of networks whose weights were trained to take few values packed, in as many bits as "
        "those are worth; a client unpacks them when it starts for the first time",
    )
    group.add_argument(
        "--mixed_budget_bytes", type=float, metavar="N", help="the most that mixed's files take together"
    )
    group.add_argument(
        "--mixed_budget_db",
        type=float,
        metavar="DB",
        help="how close mixed's median picture must come to float32's: the peak signal-to-noise ratio in decibels "
        "(default: 40, where no bytes are given)",
    )
    group.add_argument(
        "--judged_prompts",
        type=int,
        metavar="N",
        help="prompts that every precision draws beside float32 where the run has an exact score; 0 judges by decibels "
        "(default: 192)",
    )
    group.add_argument(
        "--judged_loss",
        type=float,
        metavar="SHARE",
        help="how far the lower bound of (gained - lost) / prompts may lie below 0 (default: 0.05)",
    )
    group.add_argument(
        "--judged_db",
        type=float,
        metavar="DB",
        help="where there is no exact score: how close the median example must come to float32's (default: 35)",
    )


def chosen_precisions(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(precisions or None for the default, `Limits`, `Budget`) of `snapgen export`.

    Raises:
        ConfigError: a precision that cannot be had, with the reason; a number that nobody can mean; a budget of a
            precision that is not asked for.
    """
    from snapgen_jax.export.judging import Limits
    from snapgen_jax.export.mixed import Budget
    from snapgen_jax.export.precision import checked

    def given(**named: Any) -> dict[str, Any]:
        return {name: value for name, value in named.items() if value is not None}

    try:
        precisions = None if options.precisions is None else checked(options.precisions.split(","))
    except ValueError as error:
        raise ConfigError(f"--precisions={options.precisions}: {error}") from error
    if options.packed and precisions is not None and "int8" not in precisions:
        raise ConfigError(f"--packed is of the precision int8; add it, as in --precisions={options.precisions},int8")
    budgets = given(bytes=options.mixed_budget_bytes, decibels=options.mixed_budget_db)
    if budgets and "mixed" not in (precisions or ()):
        raise ConfigError("a budget is for the precision mixed; add --precisions=f32,mixed, or leave out the budget")
    limits = given(prompts=options.judged_prompts, loss=options.judged_loss, decibels=options.judged_db)
    try:
        return precisions, Limits(**limits), Budget(**budgets)
    except FieldError as error:
        names = {"bytes": "mixed_budget_bytes", "prompts": "judged_prompts", "loss": "judged_loss"}
        names["decibels"] = "judged_db" if "decibels" in limits and error.field not in budgets else "mixed_budget_db"
        raise ConfigError(f"--{names[error.field]} {error.reason}") from error
