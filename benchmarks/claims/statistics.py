"""Bounds of paired differences, and what they show. Every claim is judged here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from scipy import stats

DRAWS = 10_000
ABOVE_A_TIE = 1e-6  # the least lower bound of something better: a tie shows nothing
SEEDS = 3  # asked for where a single seed gives no bound
Numbers = Mapping[str, Any]  # floats by name, and as NAME.each those of the prompts
Seeds = Mapping[str, Numbers]  # by seed
Status = Literal["shown", "not shown", "not resolved"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference, positive where the first is better.

    Attributes:
        mean: over seeds and prompts.
        low: the lower bound that the true mean exceeds with 95%; None where a single number gives no bound.
        high: the upper bound, likewise.
        over: what the bound is over: "prompts and seeds", "prompts", "seeds", or "exact".
        seeds: how many.
        prompts: a seed's; 0 where only its mean was kept.
        width_of_seeds: of `mean - low`, what the seeds alone would give.
        width_of_prompts: of it, what the prompts alone would give.
    """

    mean: float
    low: float | None
    high: float | None
    over: str
    seeds: int = 1
    prompts: int = 0
    width_of_seeds: float = 0.0
    width_of_prompts: float = 0.0

    @property
    def width(self) -> float:
        """How far the bound lies below the mean."""
        return math.inf if self.low is None else self.mean - self.low


def difference(a: Seeds, b: Seeds, key: str, factor: float = 1.0, sign: int = 1, name: str = "") -> Difference:
    """`sign (a - factor b)` in the number `key`, over the seeds that both rows have. What was measured once, and which
    `landing.rows` therefore holds as one object for all seeds, counts as one.

    The bound is a bootstrap where the prompts' numbers are there, and Student's t over seeds where only means are.
    One seed without prompts has the bound that was computed when they were there, if that was kept (`kept_bound`).

    Args:
        a: one row's numbers by seed.
        b: the other's.
        key: of the number; "KEY.each" is a list with the number of each prompt, in the same order in both rows.
        factor: of `b`.
        sign: -1 for a number that is better when smaller.
        name: of row `b`, under which a bound was kept.
    """
    each = f"{key}.each"
    objects = {
        seed: tuple(id(row[seed].get(name)) for row in (a, b) for name in (key, each))
        for seed in sorted(a.keys() & b.keys())
    }
    seeds = sorted({of: seed for seed, of in reversed(objects.items())}.values())
    if all(each in row[seed] for row in (a, b) for seed in seeds):
        pairs = [(a[seed][each], b[seed][each]) for seed in seeds]
        return bootstrap(sign * np.array([np.subtract(x, np.multiply(factor, y)) for x, y in pairs]))
    values = np.array([sign * (a[seed][key] - factor * b[seed][key]) for seed in seeds])
    if len(values) > 1:
        return students_t(values)
    kept = a[seeds[0]].get(kept_bound(key, factor, name))
    if kept is None:
        return Difference(float(values[0]), None, None, "")
    width = kept["mean"] - kept["low"]
    return Difference(kept["mean"], kept["low"], kept["mean"] + width, "prompts", 1, kept["prompts"], 0.0, width)


def kept_bound(key: str, factor: float, name: str) -> str:
    """The name of a bound that is kept in a row in place of its prompts' numbers: `{mean, low, prompts}`."""
    return f"{key} over {factor:g} {name}"


def bootstrap(values: np.ndarray) -> Difference:
    """The mean of differences `[seeds, prompts]`, with bounds by resampling seeds and prompts together.

    All seeds answer the same prompts, so rows and columns are drawn apart (Owen 2007, "The pigeonhole bootstrap",
    which errs to the wide side). Of n rows or columns n - 1 are drawn, which makes the variance of a mean right for
    small n. Three seeds still say little of others: their bound is hardly below the worst of them.
    """
    count, prompts = values.shape
    if values.size == 1:
        return Difference(float(values[0, 0]), None, None, "", 1, 1)
    rng = np.random.default_rng(0)
    of_seeds, of_prompts = _weights(rng, count), _weights(rng, prompts)  # [R, S], [R, P]

    def bounds(means: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(means, (0.05, 0.95))
        return float(low), float(high)

    mean = float(values.mean())
    low, high = bounds(((of_seeds @ values) * of_prompts).sum(1))
    over = " and ".join(what for what, n in (("prompts", prompts), ("seeds", count)) if n > 1)
    width_of_seeds = mean - bounds(of_seeds @ values.mean(1))[0]
    width_of_prompts = mean - bounds(of_prompts @ values.mean(0))[0]
    return Difference(mean, low, high, over, count, prompts, width_of_seeds, width_of_prompts)


def _weights(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of `count` things is drawn, as shares: `[DRAWS, count]`."""
    drawn = max(1, count - 1)
    return rng.multinomial(drawn, np.full(count, 1 / count), size=DRAWS) / drawn


def students_t(values: np.ndarray) -> Difference:
    """The mean of one difference a seed, with bounds by Student's t."""
    width = float(stats.t.ppf(0.95, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    mean = float(values.mean())
    return Difference(mean, mean - width, mean + width, "seeds", len(values), 0, width, 0.0)


def exact(value: float) -> Difference:
    """Something that is known without an error."""
    return Difference(value, value, value, "exact")


def verdict(found: Difference, floor: float, margin: float) -> Status:
    """What a difference shows of the claim that it exceeds `floor`.

    "not resolved" is a bound wider than the margin, which could show the claim neither right nor wrong.

    Args:
        found: the difference.
        floor: `ABOVE_A_TIE` for better, `-margin` for no worse.
        margin: the smallest difference that matters.
    """
    if found.low is None or found.high is None:
        return "not resolved"
    if found.low > floor:
        return "shown"
    return "not shown" if found.high <= floor or found.width <= margin else "not resolved"


def sample_needed(found: Difference, margin: float) -> str:
    """The sample whose bound would be as narrow as the margin: "9 seeds of 2048 prompts".

    Seeds and prompts may each take half of the margin's square. Of a number that has no margin, the sample that would
    tell a difference of this size from none; "more seeds" where there is no difference either.
    """
    if found.low is None:
        return f"{SEEDS} seeds"
    margin = margin or abs(found.mean)
    if not margin:
        return "more seeds"
    if not found.prompts:
        return f"{_seeds_by_t(found, margin)} seeds"
    half = margin**2 / (1 if found.seeds == 1 else 2)
    seeds, prompts = (
        math.ceil(n * max(1.0, width**2 / half))
        for n, width in ((found.seeds, found.width_of_seeds), (found.prompts, found.width_of_prompts))
    )
    return f"{seeds} seed{'s' if seeds > 1 else ''} of {prompts} prompts"


def _seeds_by_t(found: Difference, margin: float) -> int:
    """The fewest seeds whose bound by Student's t is as narrow as the margin, at the spread of these."""
    spread = found.width * math.sqrt(found.seeds) / stats.t.ppf(0.95, found.seeds - 1)
    n = max(found.seeds, math.floor((stats.norm.ppf(0.95) * spread / margin) ** 2))  # which the normal would ask for
    while stats.t.ppf(0.95, n - 1) * spread / math.sqrt(n) > margin:
        n += 1
    return n
