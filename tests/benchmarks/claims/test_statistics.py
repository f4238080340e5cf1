"""Bounds of paired differences, and what they show."""

import math

import numpy as np
import pytest

from benchmarks.claims.statistics import (
    ABOVE_A_TIE,
    Difference,
    bootstrap,
    difference,
    kept_bound,
    sample_needed,
    verdict,
)
from tests.benchmarks.claims.rows import row

SCORE = "score.overall"


def test_the_bound_of_many_prompts_of_one_seed_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(0.2, 1.0, (1, 2_000))
    found = bootstrap(values)
    width = 1.645 * values.std(ddof=1) / math.sqrt(2_000)
    assert found.mean == pytest.approx(values.mean())
    assert found.mean - found.low == pytest.approx(width, rel=0.03)
    assert found.high - found.mean == pytest.approx(width, rel=0.03)
    assert (found.over, found.seeds, found.prompts, found.width_of_seeds) == ("prompts", 1, 2_000, 0.0)


def test_the_bound_of_seeds_whose_prompts_all_agree_is_the_worst_of_three():
    found = bootstrap(np.repeat([[0.1], [0.3], [0.2]], 50, axis=1))
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.1, 0.3))
    assert found.over == "prompts and seeds" and found.width_of_prompts == pytest.approx(0)


def test_seeds_and_prompts_are_resampled_together_so_that_each_widens_the_bound():
    rng = np.random.default_rng(2)
    of_seeds, of_prompts = rng.normal(0, 0.1, (8, 1)), rng.normal(0, 1, (1, 400))
    both = bootstrap(of_seeds + of_prompts)
    assert both.width_of_seeds == pytest.approx(bootstrap(of_seeds + 0 * of_prompts).width, rel=0.1)
    assert both.width_of_prompts == pytest.approx(1.645 * of_prompts.std() / 20, rel=0.05)
    assert both.width == pytest.approx(math.hypot(both.width_of_seeds, both.width_of_prompts), rel=0.1)


def test_the_same_prompts_for_all_seeds_give_no_narrower_bound_than_for_one():
    prompts = np.random.default_rng(3).normal(0, 1, (1, 500))
    assert bootstrap(np.repeat(prompts, 5, axis=0)).width == pytest.approx(bootstrap(prompts).width, rel=0.05)


def test_a_bound_is_the_same_each_time():
    values = np.random.default_rng(4).normal(size=(3, 100))
    assert bootstrap(values) == bootstrap(values)


def test_a_difference_is_taken_prompt_by_prompt_over_the_seeds_that_both_have():
    more, other = row(0.5, 0.6, 0.7, 0.9), dict(reversed(row(0.4, 0.5, 0.6).items()))  # the fourth has no counterpart
    found = difference(more, other, SCORE)
    assert found.low == pytest.approx(0.1) and found.seeds == 3 and found.prompts == 4, "each prompt by as much"
    assert difference(other, more, SCORE).low == pytest.approx(-0.1)
    assert difference(more, other, SCORE, sign=-1).mean == pytest.approx(-0.1)
    halved = difference(row(0.5), row(0.4), SCORE, 0.5)
    assert halved.mean == pytest.approx(0.3) and halved.low < 0.3, "a share of a prompt's score varies"


def test_what_was_measured_once_counts_as_one_seed():
    rng = np.random.default_rng(3)
    a, b = ({"mse": float(x.mean()), "mse.each": x.tolist()} for x in rng.normal(0, 1, (2, 40)))
    once = difference({"0": a}, {"0": b}, "mse")
    assert difference(dict.fromkeys("012", a), dict.fromkeys("012", b), "mse") == once and once.seeds == 1
    assert difference({"0": a, "1": a, "2": b}, dict.fromkeys("012", b), "mse").seeds == 2


def test_where_prompts_were_not_kept_three_seeds_have_the_bound_of_students_t():
    found = difference(row(0.5, 0.6, 0.7, prompts=False), row(0.4, 0.4, 0.4), SCORE)
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 2.919986 * 0.1 / math.sqrt(3), abs=1e-5)
    assert (found.over, found.seeds, found.prompts) == ("seeds", 3, 0)


def test_one_seed_without_prompts_has_no_bound_unless_one_was_kept_with_it():
    a, b = row(0.5, prompts=False), row(0.4)
    assert difference(a, b, SCORE, name="b").low is None
    a["0"][kept_bound(SCORE, 1.0, "b")] = {"mean": 0.1, "low": 0.04, "prompts": 128}
    found = difference(a, b, SCORE, name="b")
    assert (found.mean, found.low, found.prompts) == (0.1, 0.04, 128) and found.high == pytest.approx(0.16)
    assert difference(a, b, SCORE, name="another").low is None


def of(mean, width):
    return Difference(mean, mean - width, mean + width, "prompts", 1, 100, 0.0, width)


def test_better_is_a_lower_bound_above_nothing_and_a_tie_is_nothing():
    def better(mean, width):
        return verdict(of(mean, width), ABOVE_A_TIE, margin=0.03)

    assert better(0.05, 0.04) == "shown"
    assert better(0.0, 0.0) == "not shown", "a tie"
    assert better(0.02, 0.025) == "not shown", "it would have shown a difference that matters"
    assert better(-0.3, 0.1) == "not shown", "wide, but surely worse"


def test_no_worse_is_a_lower_bound_above_minus_the_margin():
    def no_worse(mean, width):
        return verdict(of(mean, width), -0.03, margin=0.03)

    assert no_worse(0.0, 0.02) == "shown" and no_worse(-0.01, 0.015) == "shown"
    assert no_worse(-0.02, 0.02) == "not shown" and no_worse(-0.2, 0.1) == "not shown"


@pytest.mark.parametrize("floor", [ABOVE_A_TIE, -0.03])
def test_a_bound_that_is_wider_than_the_margin_is_not_resolved(floor):
    assert verdict(of(0.0, 0.04), floor, margin=0.03) == "not resolved"
    assert verdict(Difference(0.5, None, None, ""), floor, margin=0.03) == "not resolved", "no bound at all"


def test_the_sample_that_would_resolve_makes_the_bound_as_narrow_as_the_margin():
    assert sample_needed(of(0.0, 0.06), 0.03) == "1 seed of 400 prompts"
    by_seeds = Difference(0.0, -0.06, 0.06, "prompts and seeds", 3, 1_000, 0.06, 0.001)
    assert sample_needed(by_seeds, 0.03) == "24 seeds of 1000 prompts"
    assert sample_needed(Difference(0.0, None, None, ""), 0.03) == "3 seeds"
    few = difference(row(0.5, 0.6, 0.7, prompts=False), row(0.6, 0.6, 0.6), SCORE)
    needed = int(sample_needed(few, 0.03).split()[0])
    assert needed > 9 * 3 / 4 and 1.7 * 0.1 / math.sqrt(needed) == pytest.approx(0.03, rel=0.05)


def test_without_a_margin_the_sample_is_that_which_would_tell_the_difference_from_none():
    few = difference(row(0.501, 0.6, 0.7, prompts=False), row(0.5, 0.7, 0.6), SCORE)
    assert int(sample_needed(few, 0.0).split()[0]) == int(sample_needed(few, abs(few.mean)).split()[0]) > 100_000
    assert sample_needed(Difference(0.0, -0.1, 0.1, "seeds", 3, width_of_seeds=0.1), 0.0) == "more seeds"
