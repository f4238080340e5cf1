"""Wilson intervals: the published formula, the behaviour at the ends, and the promised coverage; Student's interval."""

import numpy as np
import pytest
from scipy import stats

from snapgen_jax.evaluation.statistics import mean_interval, wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 64), (1, 64), (40, 64), (64, 64), (3, 5)])
def test_the_ends_are_the_shares_that_lie_a_normal_quantile_from_the_measured_one(successes, trials):
    # Wilson's definition: both ends p solve |k/n - p| = z sqrt(p (1 - p) / n).
    z = stats.norm.ppf(0.975)
    share = successes / trials
    for p in wilson_interval(successes, trials):
        assert abs(share - p) == pytest.approx(z * np.sqrt(p * (1 - p) / trials), abs=1e-9)


def test_perfect_and_hopeless_scores_keep_a_width_inside_the_unit_interval():
    low, high = wilson_interval(64, 64)
    assert 0.94 < low < 0.95 and high == pytest.approx(1)
    assert wilson_interval(0, 64)[0] == pytest.approx(0)
    assert wilson_interval(0, 64)[1] == pytest.approx(1 - low)


def test_the_interval_covers_the_true_share_about_as_often_as_it_says():
    n = 64
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    shares = np.linspace(0.05, 0.95, 37)
    coverage = [
        sum(stats.binom.pmf(k, n, p) for k, (low, high) in enumerate(intervals) if low <= p <= high) for p in shares
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.91


def test_more_trials_or_less_confidence_make_it_narrower():
    def width(*arguments):
        low, high = wilson_interval(*arguments)
        return high - low

    assert width(400, 640) < width(40, 64)
    assert width(40, 64, 0.8) < width(40, 64)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (5, 4), (-1, 4)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        wilson_interval(successes, trials)


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says_and_needs_two_values():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    inside = [low < 3.0 < high for low, high in map(mean_interval, draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    with pytest.raises(ValueError, match="two or more"):
        mean_interval(draws[0, :1])
