"""Bounds of paired verdicts, and decibels."""

import math

import numpy as np
import pytest

from snapgen_jax.bounds import FieldError
from snapgen_jax.export.judging import (
    CONFIDENCE,
    PAIRED,
    Judge,
    Limits,
    decibels,
    describe_fidelity,
    fidelity,
    judged_by,
    objection,
    paired,
    paired_low,
)


def test_where_nothing_changed_the_bound_is_that_of_the_sample_size():
    for n in (10, 96, 384):  # T(d) = -n d / sqrt(n d (1 - d)) at d < 0: d = -z^2 / (n + z^2)
        assert paired_low(0, 0, n) == pytest.approx(-(CONFIDENCE**2) / (n + CONFIDENCE**2), rel=1e-6)


def test_with_many_prompts_the_bound_is_that_of_a_mean():
    gained, lost, n = 900, 1300, 10_000
    mean = (gained - lost) / n
    wald = mean - CONFIDENCE * math.sqrt(((gained + lost) / n - mean**2) / n)
    assert paired_low(gained, lost, n) == pytest.approx(wald, abs=2e-4)


def test_the_true_loss_is_above_the_bound_as_often_as_is_said():
    rng, n, p_gained, p_lost = np.random.default_rng(0), 192, 0.01, 0.04
    draws = rng.multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost], size=2000)
    bounds = {(g, l): paired_low(g, l, n) for g, l in {(int(g), int(l)) for g, l, _ in draws}}
    below = np.mean([bounds[int(g), int(l)] < p_gained - p_lost for g, l, _ in draws])
    assert 0.93 < below < 0.975


def test_impossible_counts_are_refused():
    for counts in ((-1, 0, 3), (2, 2, 3), (0, 0, 0)):
        with pytest.raises(ValueError, match="expected no more than were tried"):
            paired_low(*counts)
    assert paired_low(0, 3, 3) == -1


def test_one_grey_level_everywhere_is_48_decibels():
    picture = np.full((2, 4, 4, 3), 100, np.uint8)
    assert decibels(picture + np.uint8(1), picture) == pytest.approx([48.1308] * 2, abs=1e-4)
    assert decibels(picture, picture).tolist() == [99.0, 99.0]


def test_arrays_are_measured_by_their_range_and_nan_is_nothing():
    array = np.array([[0.0, 4.0], [2.0, 2.0]], np.float32)
    made = array + np.float32([[0.4, 0.4], [np.nan, 0]])
    assert decibels(made, array) == pytest.approx([20.0, 0.0], abs=1e-4)
    assert fidelity({"a": made, "b": array}, {"a": array, "b": array}) == pytest.approx([20.0, 0.0], abs=1e-4)


def found(before: int, gained: int, lost: int, count: int = 192, db: float = 20.0) -> dict:
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    verdicts = {False: [i < before for i in range(count)]}
    verdicts[True] = [i >= lost if i < before else i < before + gained for i in range(count)]
    judge = Judge("test", [""] * count, range(count), lambda i, image: verdicts[image.shape[0] == 2][i])
    facts = {**describe_fidelity(np.full(3, db)), "paired": paired(judge, images, np.repeat(images, 2, axis=1))}
    return {**facts, "judged_by": judged_by(facts, Limits())}


def test_verdicts_are_compared_prompt_by_prompt():
    score = found(100, 3, 5)["paired"]
    assert (score["gained"], score["lost"], score["prompts"]) == (3, 5, 192)
    assert score["variant"] - score["f32"] == pytest.approx(-2 / 192) and score["low"] < -2 / 192


def test_few_losses_pass_and_many_are_named():
    assert objection(found(100, 2, 3), Limits()) is None
    assert "loses 19: the lower bound of the difference is -0.1" in (objection(found(100, 6, 19), Limits()) or "")
    assert objection(found(100, 6, 19), Limits(loss=0.2)) is None


def test_a_score_with_nothing_to_lose_does_not_judge():
    facts = found(4, 0, 4)
    assert "has nothing to lose" in facts["judged_by"]
    assert "20.0 dB from float32's, and at least 35.0 dB" in (objection(facts, Limits()) or "")
    assert found(100, 0, 0)["judged_by"] == PAIRED


@pytest.mark.parametrize("limits", [{"prompts": -1}, {"loss": 1.5}, {"decibels": math.nan}])
def test_limits_that_nobody_can_mean_are_refused(limits):
    with pytest.raises(FieldError):
        Limits(**limits)
