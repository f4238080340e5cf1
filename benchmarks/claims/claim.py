"""A row of the table: what a paper claims, as comparisons of measured rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from benchmarks.claims.statistics import (
    ABOVE_A_TIE,
    Difference,
    Seeds,
    difference,
    exact,
    sample_needed,
    verdict,
)

Rows = Mapping[str, Seeds]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that rows have.

    Attributes:
        title: in the table.
        margin: the smallest difference that matters. "no worse" allows it, and a wider bound resolves nothing.
        smaller: whether it is better when smaller.
        digits: after the point, in the table.
    """

    title: str
    margin: float = 0.0
    smaller: bool = False
    digits: int = 3


SCORE, HELD_OUT, FRECHET, DIVERSITY = "score.overall", "score.heldout", "frechet.distance", "diversity.pairwise"
METRICS: Mapping[str, Metric] = {
    "parameters": Metric("parameters", smaller=True, digits=0),
    "multiply_adds": Metric("MMAC", smaller=True, digits=1),
    "milliseconds": Metric("ms", smaller=True, digits=1),
    SCORE: Metric("score", margin=0.03),
    HELD_OUT: Metric("held-out", margin=0.03),
    FRECHET: Metric("Frechet", margin=0.006, smaller=True),  # real images differ by as much, of 2,048
    DIVERSITY: Metric("diversity", margin=0.03),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A comparison of two rows in one number.

    Attributes:
        goal: "better": the lower bound of `a - share b` is above 0. "no worse": it is above minus the margin. "fewer":
            `b` has at least `share` times of what `a` has, of something that is known exactly.
        a: row that the claim speaks for.
        b: row that it is compared with.
        metric: key of the number.
        share: of `b` that is asked for.
    """

    goal: Literal["better", "no worse", "fewer"]
    a: str
    b: str
    metric: str = SCORE
    share: float = 1.0

    def missing(self, rows: Rows) -> list[str]:
        """The rows that it needs and that are not there, or lack its number."""
        return [row for row in (self.a, self.b) if not any(self.metric in one for one in rows.get(row, {}).values())]

    def judge(self, rows: Rows, metrics: Mapping[str, Metric]) -> dict[str, Any]:
        """The comparison and what it shows, as plain data. All rows are there."""
        metric = metrics[self.metric]
        found = self._difference(rows, metric)
        floor = {"better": ABOVE_A_TIE, "no worse": -metric.margin, "fewer": self.share}[self.goal]
        status = verdict(found, floor if self.goal != "fewer" else floor - 1e-9, metric.margin)
        needs = {"needs": sample_needed(found, metric.margin)} if status == "not resolved" else {}
        return {
            "compared": self._title(metric),
            "mean": found.mean,
            "low": found.low,
            "floor": floor,
            "over": found.over,
            "seeds": found.seeds,
            "prompts": found.prompts,
            "digits": max(metric.digits, 3),
            "status": status,
            **needs,
        }

    def _difference(self, rows: Rows, metric: Metric) -> Difference:
        a, b = rows[self.a], rows[self.b]
        if self.goal == "fewer":
            seed = min(a.keys() & b.keys())
            return exact(b[seed][self.metric] / a[seed][self.metric])
        return difference(a, b, self.metric, self.share, -1 if metric.smaller else 1, self.b)

    def _title(self, metric: Metric) -> str:
        a, b = f"{metric.title}({self.a})", f"{metric.title}({self.b})"
        if self.goal == "fewer":
            return f"{b} / {a}"
        b = b if self.share == 1 else f"{self.share:g} {b}"
        return f"{b} - {a}" if metric.smaller else f"{a} - {b}"


def better(a: str, b: str, metric: str = SCORE, share: float = 1.0) -> Part:
    """`a` exceeds `share` times `b`; of a number that is better when smaller, it stays below."""
    return Part("better", a, b, metric, share)


def no_worse(a: str, b: str, metric: str = SCORE, share: float = 1.0) -> Part:
    """`a` reaches `share` times `b`, less the metric's margin."""
    return Part("no worse", a, b, metric, share)


def fewer(a: str, b: str, metric: str, times: float = 1.001) -> Part:
    """`b` has at least `times` as much as `a` of a cost that is known exactly, on one machine."""
    return Part("fewer", a, b, metric, times)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        claim: what is to be seen.
        parts: all must be shown.
        control: the row must fail, since what it says is false; where it is shown, the measure sees nothing.
    """

    claim: str
    parts: tuple[Part, ...]
    control: bool = False

    @property
    def rows(self) -> tuple[str, ...]:
        """Those that it needs."""
        return tuple(dict.fromkeys(row for part in self.parts for row in (part.a, part.b)))

    def missing(self, rows: Rows) -> list[str]:
        """The rows that are not there; all of them where no seed has all."""
        missing = list(dict.fromkeys(row for part in self.parts for row in part.missing(rows)))
        apart = not missing and not set.intersection(*(set(rows[row]) for row in self.rows))
        return list(self.rows) if apart else missing

    def judge(self, rows: Rows, metrics: Mapping[str, Metric]) -> dict[str, Any]:
        """Its line of the table as plain data, of rows that are all there."""
        parts = [part.judge(rows, metrics) for part in self.parts]
        return {"claim": self.claim, "control": self.control, "status": _together(parts), "parts": parts}


def _together(parts: Sequence[Mapping[str, Any]]) -> str:
    """All shown, or one not shown, or else not resolved."""
    statuses = {part["status"] for part in parts}
    return "shown" if statuses == {"shown"} else "not shown" if "not shown" in statuses else "not resolved"
