"""Adapters: LoRA (arXiv 2106.09685) as DreamBooth uses it (arXiv 2208.12242): a new object from ten images.

One base network, trained once; a seed is a seed of the adapters on it. The base is drawn from by the adapted run
without its adapters, so that it answers the same prompts with the same noise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.claims.claim import SCORE, Claim, Metric, better, no_worse
from benchmarks.claims.scores import PermutedCaptions
from benchmarks.claims.trials import Draw, Effort, Trial

NEW = "new_object.score"
METRICS = {NEW: Metric("new object", margin=0.03)}

BASE = {
    "ci": Effort(),
    "short": Effort(6_000),
    "night": Effort(12_000),
    "gpu": Effort(12_000),
    "world": Effort(12_000),
}
ADAPTERS = {
    "ci": Effort(),
    "short": Effort(1_500, 3),
    "night": Effort(1_500, 3),
    "gpu": Effort(1_500, 3),
    "world": Effort(1_500, 3),
}


def without_adapters(generator: Any) -> Any:
    """A generator of a run of adapters with all of them zero: the network that they adapt."""
    return generator.with_weights(jax.tree.map(jnp.zeros_like, generator.params), generator.frozen)


BOTH = ("compositional", "new_object")
TRIALS = {
    "base": Trial("adapters_base", BASE, draws={}, shared=True),
    "adapted": Trial(
        "adapters",
        ADAPTERS,
        earlier={"base": "base"},
        draws={
            "": Draw(evaluators=BOTH),
            "without adapters": Draw(evaluators=BOTH, wrap=without_adapters),
            "permuted captions": Draw(evaluators=("new_object",), wrap=PermutedCaptions),
        },
    ),
    "no prior": Trial(
        "adapters",
        ADAPTERS,
        ("data.mixture=()", "data.source=new_object"),
        {"base": "base"},
        {"": Draw(evaluators=BOTH)},
    ),
}

CLAIMS = (
    Claim(
        "a new object is learnt from ten images, and the old score is no worse by 0.03",
        (better("adapted", "adapted, without adapters", NEW), no_worse("adapted", "adapted, without adapters", SCORE)),
    ),
    Claim("without examples of what was known, more of it is forgotten", (better("adapted", "no prior", SCORE),)),
    Claim(
        "the network knows the new word without adapters",
        (no_worse("adapted, without adapters", "adapted", NEW),),
        control=True,
    ),
    Claim(
        "the colour that is said does not matter: another prompt's images score as well",
        (no_worse("adapted, permuted captions", "adapted", NEW),),
        control=True,
    ),
)
