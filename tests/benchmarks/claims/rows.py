"""Rows of numbers, and a small paper, for the tests of claims."""

import numpy as np

from benchmarks.claims.claim import DIVERSITY, Claim, better, no_worse
from benchmarks.claims.landing import Landed
from benchmarks.claims.trials import Draw, Effort, Measure, Paper, Trial

PROMPTS = np.array([-0.15, -0.05, 0.05, 0.15])


def row(*scores, heldout=0.5, diversity=1.0, distance=1.0, parameters=1, prompts=True):
    """`{seed: numbers}`; of four prompts, whose scores lie 0.1 apart. No two seeds share an object."""
    found = {}
    for seed, s in enumerate(scores):
        other = {"score.heldout": heldout, "diversity.pairwise": diversity, "frechet.distance": distance}
        common = {name: value + 1e-9 * seed for name, value in other.items()}
        each = {"score.overall.each": (s + PROMPTS).tolist()} if prompts else {}
        found[str(seed)] = {"score.overall": s, **each, **common, "parameters": parameters}
    return found


def costs(arg, workdirs):
    return {"alone": {"milliseconds": 2.5}}


STUDENT = {"ci": Effort(), "short": Effort(2_000), "night": Effort(4_000, 3), "gpu": Effort(4_000, 3)}
BASE = {"ci": Effort(), "short": Effort(1_000), "night": Effort(1_000), "gpu": Effort(1_000)}
FROM_BASE = {"inputs.text_workdir": "base"}
SMALL = Paper(
    "small",
    (
        Claim("the method helps", (better("method", "alone"),)),
        Claim("few steps are enough", (no_worse("method, few", "method"), better("method, few", "alone", DIVERSITY))),
        Claim("bfloat16 costs nothing", (no_worse("rounded", "alone"),)),
        Claim("captions do not matter", (no_worse("method, blind", "method"),), control=True),
    ),
    {
        "base": Trial("clip", BASE, draws={}, shared=True),
        "teacher": Trial("teacher", BASE, earlier=FROM_BASE, shared=True),
        "alone": Trial("student", STUDENT, earlier=FROM_BASE),
        "method": Trial(
            "student",
            STUDENT,
            earlier=FROM_BASE,
            draws={"": Draw(), "few": Draw({"steps": 4}), "blind": Draw()},
        ),
        "rounded": Trial("student", {"gpu": Effort(4_000, 3)}, earlier=FROM_BASE, dtype="bfloat16"),
    },
    {"costs": Measure(costs, ("alone",), ("milliseconds",), ("ci", "night"))},
)


def landed(trial, seed=0, updates=None, minutes=30.0, machine="m", paper=SMALL, **scores):
    """A landed file; a keyword is a draw and its score, "" by default 0.5."""
    rows = paper.trials[trial].rows(trial)
    found = {rows[draw]: row(score)["0"] for draw, score in (scores or {"": 0.5}).items()}
    updates = updates or paper.trials[trial].effort["gpu"].updates
    return Landed(trial, seed, found, "", machine, "c0ffee", minutes, None, updates)
