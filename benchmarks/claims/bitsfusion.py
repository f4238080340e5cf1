"""BitsFusion (arXiv 2406.04333): weights of two bits that draw as well as the float ones that they were.

One float network, trained once and kept, which every seed quantises; a seed is one of the quantised training. Errors
are of the predicted images, against that network on the same noise, after the same number of updates. The bits by layer
were measured on that network, by the stage "bits" of `configs/shapes/bits.py:quick`, and are kept beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from benchmarks.claims.adapters import BASE
from benchmarks.claims.claim import SCORE, Claim, Metric, better, no_worse
from benchmarks.claims.trials import Draw, Effort, Trial
from snapgen_jax.generation import Generator
from snapgen_jax.networks.quantise import first_scales
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.recipes.quantised import SCALES

ERROR, LATE = "validation_loss.image_error", "validation_loss.image_error.t=0.95"
LOSS, FLOAT_LOSS = "validation_loss.mean", "validation_loss.unquantised"
LATE_LOSSES = ("validation_loss.t=0.80", "validation_loss.t=0.95")
METRICS = {
    ERROR: Metric("image error", smaller=True, digits=5),
    LATE: Metric("image error at t=0.95", smaller=True, digits=5),
    LOSS: Metric("loss", smaller=True, digits=4),
    FLOAT_LOSS: Metric("float loss", smaller=True, digits=4),
    **{key: Metric(f"loss at {key[-6:]}", smaller=True, digits=4) for key in LATE_LOSSES},
}
BITS = pathlib.Path(__file__).with_name("bitsfusion_bits.json")

STAGE = {
    "ci": Effort(),
    "short": Effort(600, 3),
    "night": Effort(2_000, 3),
    "gpu": Effort(2_000, 3),
    "world": Effort(2_000, 3),
}


def mixed(arg: str) -> list[str]:
    """The bits by layer, about 2.0 on average; the smallest form's network has other layers."""
    return [] if arg == "runlocal" else [f"bits={json.loads(BITS.read_text())['bits']!r}"]


def with_float(generator: Any) -> Any:
    """A generator of a quantised run that has the float network beside it, for errors against that."""
    return generator.with_weights(generator.params, generator.recipe.load_frozen(None, "train"))


def as_float(generator: Any) -> Any:
    """The float network that a run quantises, as a generator of its own."""
    recipe = generator.recipe
    frozen = dict(recipe.load_frozen(None, "train"))
    frozen[recipe.role] = frozen.pop(recipe.teacher)
    fields = {field.name: getattr(recipe.config, field.name) for field in dataclasses.fields(FlowMatchingConfig)}
    method: Any = FlowMatching(FlowMatchingConfig(**fields), recipe.platform)
    return Generator(method, {"model": {}}, frozen, generator.tokenizer)


def untrained(generator: Any) -> Any:
    """A generator of a quantised run before its first update: the float weights, rounded."""
    recipe = generator.recipe
    frozen = recipe.load_frozen(None, "train")
    network = frozen[recipe.teacher]
    scales = first_scales(network, recipe.bits, recipe.config.levels)
    return generator.with_weights({"model": {recipe.role: network, SCALES: scales}}, frozen)


ERRORS = Draw(evaluators=("validation_loss",), wrap=with_float)
START = {"base": "base", "init_from": "base"}
ONE_BIT = ("default_bits=1",)
TRIALS = {
    "base": Trial("adapters_base", BASE, draws={}, shared=True, stored="shapes_unet"),
    "unbalanced": Trial(
        "quantised", STAGE, (*ONE_BIT, "levels=unbalanced", "initialisation=min_max"), START, {"": ERRORS}
    ),
    "balanced": Trial("quantised", STAGE, (*ONE_BIT, "initialisation=min_max"), START, {"": ERRORS}),
    "alternating": Trial("quantised", STAGE, ONE_BIT, START, {"": ERRORS}),
    "uniform": Trial("quantised", STAGE, ("default_bits=2",), START, {"": ERRORS}),
    "mixed": Trial(
        "quantised",
        STAGE,
        mixed,
        START,
        {
            "": ERRORS,
            "drawn": Draw(evaluators=("compositional",)),
            "float": Draw(evaluators=("compositional",), wrap=as_float),
            "untrained": Draw(evaluators=("compositional",), wrap=untrained),
        },
    ),
    "no features": Trial("quantised", STAGE, lambda arg: [*mixed(arg), "feature_weight=0.0"], START, {"": ERRORS}),
    # The paper's weight of 0.01 makes them nine tenths of the gradient here; with this they begin as the output does.
    "light features": Trial(
        "quantised", STAGE, lambda arg: [*mixed(arg), "feature_weight=0.0005"], START, {"": ERRORS}
    ),
    "even times": Trial("quantised", STAGE, lambda arg: [*mixed(arg), "schedule.density=uniform"], START, {"": ERRORS}),
    "stage two": Trial(
        "quantised_data",
        STAGE,
        mixed,
        {"base": "base", "init_from": "mixed"},
        {"": Draw(evaluators=("compositional", "validation_loss"))},
    ),
}

CLAIMS = (
    Claim(
        "of one nominal bit, balanced levels are closer to the float network, and fitted scales closer still",
        (better("balanced", "unbalanced", ERROR), better("alternating", "balanced", ERROR)),
    ),
    Claim(
        "measured bits, 2.0 on average, are closer than two bits everywhere, 2.3",
        (better("mixed", "uniform", ERROR),),
    ),
    Claim("features of the stages help, at the paper's weight", (better("mixed", "no features", ERROR),)),
    Claim("and where they weigh as the output does", (better("light features", "no features", ERROR),)),
    Claim("times drawn towards noise help there", (better("mixed", "even times", LATE),)),
    Claim(
        "at two bits the score is no worse than the float network's by 0.03",
        (no_worse("stage two", "mixed, float"),),
    ),
    Claim("stage II scores no worse than stage I", (no_worse("stage two", "mixed, drawn", SCORE),)),
    Claim(
        "and its loss is lower at the late times towards which both are drawn",
        tuple(better("stage two", "mixed", key) for key in LATE_LOSSES),
    ),
    Claim(
        "and in the mean over all times, four fifths of which is the loss at t=0.05",
        (better("stage two", "mixed", LOSS),),
    ),
    Claim(
        "weights that are rounded without training draw as well",
        (no_worse("mixed, untrained", "mixed, float"),),
        control=True,
    ),
)
