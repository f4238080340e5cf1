"""LazyDiT (arXiv 2412.12444): gates that skip modules of a 20-step sampler lose less than what costs as much otherwise.

One DiT, trained once; a seed is a seed of the gates on it. There are gates for each share of the calls, each trained at
the price that `derivations.lazy_rho` finds for it. They are held against fewer steps, against schedules drawn at random
and against whole steps whose modules are all reused, at equal shares.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims.claim import FRECHET, SCORE, Claim, Metric, Part, better, no_worse
from benchmarks.claims.trials import Draw, Effort, Trial

DEVIATION = "deviation.grey_levels"
METRICS = {DEVIATION: Metric("grey levels", margin=0.5, smaller=True)}
STEPS = 20
PRICES = {10: 1.2e-4, 20: 1.7e-4, 30: 2.5e-4, 40: 5e-4, 50: 1e-2}  # rho by the percents of all calls that are skipped
SCORED = (30, 50)  # whose images are scored besides; with less skipped they are the full sampler's but for a few levels
FULL = {"lazy": 0.0, "schedule": ""}
BASE = {"ci": Effort(), **{name: Effort(20_000) for name in ("short", "night", "gpu", "world")}}
GATES = {"ci": Effort(), **{name: Effort(500, 3) for name in ("short", "night", "gpu", "world")}}


# --- the baselines that skip as much ---------------------------------------------------------------------------------


def calls(arg: str) -> np.ndarray:
    """All module calls of the sampler in a form of the configs, `[steps, modules]`: true where they may be skipped."""
    steps, modules = (4, 4) if arg == "runlocal" else (STEPS, 12)
    return np.repeat(np.arange(steps)[:, None] % 2 == 1, modules, axis=1)


def at_random(percent: int, arg: str, seed: int) -> dict[str, Any]:
    """A schedule that skips a share of all calls, drawn from those that may be skipped."""
    may_skip = calls(arg)
    chosen = np.random.default_rng(seed).permutation(np.argwhere(may_skip))[: round(percent / 100 * may_skip.size)]
    runs = np.ones_like(may_skip)
    runs[tuple(chosen.T)] = False
    return {"schedule": _text(runs)}


def whole_steps(percent: int, arg: str, seed: int) -> dict[str, Any]:
    """A schedule that reuses all modules of as many even steps, evenly apart; the seed changes nothing."""
    del seed
    may_skip = calls(arg)
    even = np.flatnonzero(may_skip[:, 0])
    count = round(percent / 100 * len(may_skip))
    runs = np.ones_like(may_skip)
    runs[even[np.linspace(0, len(even) - 1, count).round().astype(int)]] = False
    return {"schedule": _text(runs)}


def _text(runs: np.ndarray) -> str:
    """A schedule `[steps, modules]` as the sampler reads it."""
    return ",".join("".join("1" if run else "0" for run in row) for row in runs)


def steps_for(percent: int) -> int:
    """Steps of the full sampler that cost as much as the gates' 20."""
    return round(STEPS * (1 - percent / 100))


# --- what is trained and drawn ---------------------------------------------------------------------------------------


def _draw(percent: int, options: Any, reference: Mapping[str, Any], scored: bool = True) -> Draw:
    scores = ("compositional", "frechet") if scored and percent in SCORED else ()
    return Draw(options, (*scores, "deviation"), reference=reference)


TRIALS = {
    "base": Trial(
        "lazy_base",
        BASE,
        draws={
            "": Draw({"steps": STEPS}, ("compositional", "frechet")),
            **{f"{steps_for(p)} steps": _draw(p, {"steps": steps_for(p)}, {"steps": STEPS}) for p in PRICES},
        },
        shared=True,
        stored="shapes_dit",
    ),
    **{
        f"gates {percent}%": Trial(
            "lazy",
            GATES,
            (f"rho_attention={price}", f"rho_ffn={price}"),
            {"base": "base"},
            {
                "": _draw(percent, {"lazy": percent / 100}, FULL),
                "at random": _draw(percent, functools.partial(at_random, percent), FULL, scored=False),
                "whole steps": _draw(percent, functools.partial(whole_steps, percent), FULL, scored=False),
            },
        )
        for percent, price in PRICES.items()
    },
}


# --- what is claimed -------------------------------------------------------------------------------------------------


def _nearer(than: str, percents: Sequence[int] = (10, 20, 30, 40)) -> tuple[Part, ...]:
    return tuple(better(f"gates {p}%", than.format(p=p, steps=steps_for(p)), DEVIATION) for p in percents)


CLAIMS = (
    Claim(
        "at 10 to 40% skipped, gates lead nearer to the full sampler than fewer steps do",
        _nearer("base, {steps} steps"),
    ),
    Claim("they lead nearer than whole steps that are reused", _nearer("gates {p}%, whole steps")),
    Claim("they lead nearer than a schedule drawn at random", _nearer("gates {p}%, at random")),
    Claim(
        "at 30% skipped the images are as good as the full sampler's",
        (no_worse("gates 30%", "base", SCORE), no_worse("gates 30%", "base", FRECHET)),
    ),
    Claim(
        "at 30% skipped the images are better than those of as many fewer steps",
        (better("gates 30%", "base, 14 steps", SCORE), better("gates 30%", "base, 14 steps", FRECHET)),
    ),
    Claim(
        "at 50% skipped the images are better than those of half the steps",
        (better("gates 50%", "base, 10 steps", SCORE), better("gates 50%", "base, 10 steps", FRECHET)),
    ),
    Claim(
        "at 50% a schedule that is fixed beforehand is worse: what gates learn is more than that",
        (better("gates 50%", "gates 50%, whole steps", DEVIATION),),
        control=True,
    ),
    Claim(
        "a schedule drawn at random is no worse",
        tuple(no_worse(f"gates {p}%, at random", f"gates {p}%", DEVIATION) for p in (10, 30)),
        control=True,
    ),
)
