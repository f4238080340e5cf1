"""A paper is plain data, and its mistakes are found when it is read."""

import dataclasses

import pytest

from benchmarks.claims.claim import Claim, better
from benchmarks.claims.trials import Effort, paper, paper_names
from tests.benchmarks.claims.rows import FROM_BASE, SMALL


def test_papers_are_the_modules_that_have_claims():
    assert "snapgen" in paper_names() and not {"runner", "claim", "trials", "table"} & set(paper_names())
    assert all(paper(name).name == name for name in paper_names())
    with pytest.raises(ValueError, match=r"no paper 'snapgem'; there are .*snapgen"):
        paper("snapgem")


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (Claim("x", (better("method", "mehtod"),)), "needs the row 'mehtod'; add a trial that gives it"),
        (Claim("x", (better("method", "alone", "colour"),)), "compares 'colour'; add it to METRICS"),
    ],
)
def test_a_claim_that_nothing_can_judge_is_refused(claim, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, claims=(claim,))


def test_rows_that_no_single_budget_makes_and_a_start_from_a_later_trial_are_refused():
    trials = {**SMALL.trials, "alone": dataclasses.replace(SMALL.trials["alone"], effort={"night": Effort()})}
    with pytest.raises(ValueError, match="no budget of short, night, gpu, world makes all rows of 'bfloat16"):
        dataclasses.replace(SMALL, trials=trials)
    late = dataclasses.replace(SMALL.trials["base"], earlier={"init_from": "alone"})
    with pytest.raises(ValueError, match=r"'base' starts from \['alone'\]; list these before it"):
        dataclasses.replace(SMALL, claims=(), trials={**SMALL.trials, "base": late})


def test_a_measurement_decides_the_budget_only_of_claims_that_compare_its_numbers():
    scores, times = (Claim("x", (better("method", "alone", key),)) for key in ("score.overall", "milliseconds"))
    assert SMALL.budgets_of(scores) == ["short", "night", "gpu"] and SMALL.budgets_of(times) == ["night"]
    assert SMALL.trials_of(scores) == ["base", "alone", "method"] and FROM_BASE["inputs.text_workdir"] == "base"


def test_the_trainings_of_a_paper_leave_room_for_scoring_in_two_and_a_half_hours_of_two_cores():
    for one in map(paper, paper_names()):
        seconds = sum(
            trial.seconds("short") * len(one.seeds(name, "short"))
            for name, trial in one.trials.items()
            if "short" in trial.effort
        )
        assert 0 < seconds <= 2.2 * 3600, one.name
