"""What counts as shown of SnapGen's claims."""

import numpy as np
import pytest

from benchmarks.claims.claim import METRICS
from benchmarks.claims.snapgen import CLAIMS
from snapgen_jax.networks.counting import STEPS
from tests.benchmarks.claims.rows import row


def judged(found):
    claims = [claim for claim in CLAIMS if not claim.missing(found)]
    return {claim.claim.split(":")[0]: claim.judge(found, METRICS) for claim in claims}


def held(verdict):
    return [part["status"] == "shown" for part in verdict["parts"]]


def test_a_claim_is_shown_only_where_all_of_its_parts_hold():
    found = {
        "distilled": row(0.7, 0.71, 0.72, heldout=0.6),
        "output only": row(0.6, 0.61, 0.6),
        "alone": row(0.5, 0.51, 0.49, heldout=0.5),
        "distilled, unguided": row(0.4, 0.4, 0.4, distance=0.5),
        "alone, unguided": row(0.4, 0.4, 0.4, distance=0.7),
    }
    assert judged(found)["distillation helps"]["status"] == "shown"

    def parts(**changed):
        verdict = judged({**found, **changed})["distillation helps"]
        assert verdict["status"] == "not shown"
        return held(verdict)

    assert parts(**{"output only": row(0.7, 0.72, 0.71)}) == [False, True, True, True]
    assert parts(distilled=row(0.7, 0.71, 0.72, heldout=0.4)) == [True, True, False, True]
    assert parts(**{"distilled, unguided": row(0.4, 0.4, 0.4, distance=0.8)}) == [True, True, True, False]


def test_a_row_that_is_missing_or_shares_no_seed_is_missed():
    claim = next(claim for claim in CLAIMS if claim.claim.startswith("distillation helps"))
    found = {name: row(0.5, 0.6) for name in claim.rows}
    assert claim.missing(found) == []
    assert claim.missing({**found, "alone": {}}) == ["alone"]
    assert set(claim.missing({**found, "alone": {"3": row(0.5)["0"]}})) == set(claim.rows), "no seed has all rows"
    ladder = next(claim for claim in CLAIMS if claim.claim.startswith("the ladder"))
    networks = {f"ladder {step.name}": row(0.5) for step in STEPS}
    assert ladder.missing(networks) == ["ladder G", "ladder A"], "multiply-adds are not there yet"


def test_a_tie_shows_nothing_of_what_is_to_be_better():
    claims = [claim for claim in CLAIMS if "help" in claim.claim or "does it" in claim.claim]
    found = {name: row(0.0, 0.0, 0.0) for claim in claims for name in claim.rows}
    assert [claim.judge(found, METRICS)["status"] for claim in claims] == ["not shown"] * 3


def test_a_single_seed_is_judged_prompt_by_prompt_and_a_number_without_prompts_is_not_resolved():
    found = {name: row(0.5) for name in ("four steps", "distilled, unguided")}
    claim = judged(found)["four steps are nearly enough, without guidance"]
    assert claim["status"] == "not resolved" and held(claim) == [True, False]
    assert claim["parts"][0]["over"] == "prompts" and claim["parts"][1]["needs"] == "3 seeds"


def test_a_single_part_that_is_not_shown_decides_over_one_that_is_not_resolved():
    found = {"distilled": row(0.7), "fixed share": row(0.7), "no scaling": row(0.6, prompts=False)}
    claim = judged(found)["timestep-aware scaling helps, against a fixed share and against none"]
    assert [part["status"] for part in claim["parts"]] == ["not shown", "not resolved"]
    assert claim["status"] == "not shown"


def test_near_the_teacher_is_nineteen_twentieths_of_its_score_less_the_margin_at_a_third_of_its_size():
    teacher = row(0.8, 0.8, 0.8, parameters=300)
    near, far = row(0.78, 0.77, 0.79, parameters=90), row(0.70, 0.71, 0.69, parameters=90)
    large = row(0.78, 0.77, 0.79, parameters=110)
    claim = "the student comes near to a teacher several times its size"
    assert judged({"teacher": teacher, "distilled": near})[claim]["status"] == "shown"
    assert judged({"teacher": teacher, "distilled": far})[claim]["status"] == "not shown"
    assert judged({"teacher": teacher, "distilled": large})[claim]["status"] == "not shown"


def test_the_ladder_is_shown_only_where_parameters_multiply_adds_and_milliseconds_fall_too():
    costs = {"parameters": 90, "multiply_adds": 9.0, "milliseconds": 0.9}
    found = {f"ladder {step.name}": {"0": {**row(0.5)["0"], **costs}} for step in STEPS}
    found["ladder A"] = {"0": {**row(0.5)["0"], "parameters": 100, "multiply_adds": 10.0, "milliseconds": 1.0}}
    claim = "the ladder ends at a network that is smaller and faster, with an equal or better score"
    assert judged(found)[claim]["status"] == "shown"
    for grown in (
        {"parameters": 101},
        {"parameters": 100},
        {"multiply_adds": 10.1},
        {"milliseconds": 1.01},
        row(0.4)["0"],
    ):
        verdict = judged({**found, "ladder G": {"0": {**found["ladder G"]["0"], **grown}}})[claim]
        assert verdict["status"] == "not shown" and held(verdict).count(False) == 1


def test_the_control_of_captions_fails_where_captions_matter_and_is_shown_where_they_do_not():
    control = next(claim for claim in CLAIMS if claim.control)
    found = {"distilled": row(0.8, 0.8, 0.8), "distilled, permuted captions": row(0.1, 0.1, 0.1)}
    assert control.judge(found, METRICS)["status"] == "not shown"
    blind = {**found, "distilled, permuted captions": row(0.8, 0.79, 0.8)}
    assert control.judge(blind, METRICS)["status"] == "shown"


def test_a_difference_that_prompts_hide_is_not_resolved_and_says_how_many_would_tell():
    found = {"alone": row(0.5), "alone in bfloat16": row(0.5)}
    found["alone in bfloat16"]["0"]["score.overall.each"] = (0.5 + np.array([-0.4, 0.4, -0.4, 0.4])).tolist()
    claim = judged(found)["bfloat16 costs no score"]
    assert claim["status"] == "not resolved"
    part = claim["parts"][0]
    assert part["mean"] == pytest.approx(0) and part["mean"] - part["low"] > 0.03
    assert part["needs"].startswith("1 seed of ") and int(part["needs"].split()[3]) > 100
