"""How far a measured share may be from the true one."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a binomial proportion, (low, high).

    Unlike the textbook `p +- 1.96 sd` it stays inside [0, 1] and has a width at 0 and at 1, where the scores of a good
    or a young model are. Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Raises:
        ValueError: there are no trials, or the successes do not lie between 0 and their number.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"{successes} successes in {trials} trials; expected 0 <= successes <= trials and one trial or more"
        )
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values `[N]`, (low, high).

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no spread; give two or more")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
