"""The table of claims: what counts as shown, and what is trained for it."""

import dataclasses
import math

import numpy as np
import pytest

from benchmarks import shapes_claims
from benchmarks.shapes_claims import BUDGETS, CLAIMS, TRIALS, Runs, difference, ladder_networks, markdown, milliseconds
from snapgen_jax.config import build
from snapgen_jax.networks.unet import UNetConfig


def row(*scores, width=0.02, diversity=1.0, distance=1.0):
    common = {"score.heldout": 0.5, "diversity.pairwise": diversity, "frechet.distance": distance, "parameters": 1}
    intervals = ({"score.overall.low": s - width, "score.overall.high": s + width} for s in scores)
    return [
        {"score.overall": s, **interval, **common, "seconds": 1.0}
        for s, interval in zip(scores, intervals, strict=True)
    ]


def test_a_difference_of_three_seeds_has_the_bound_of_students_t():
    found = difference(row(0.5, 0.6, 0.7), row(0.4, 0.4, 0.4), "score.overall")
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 2.919986 * 0.1 / math.sqrt(3), abs=1e-5)
    shared = difference(row(0.5, 0.6, 0.7), row(0.4), "score.overall")  # a teacher that all seeds share
    assert shared == found


def test_a_single_seed_is_judged_by_its_prompts_and_a_number_without_interval_not_at_all():
    found = difference(row(0.5), row(0.4), "score.overall")
    assert found.low == pytest.approx(0.1 - 1.644854 / 1.959964 * math.hypot(0.02, 0.02), abs=1e-5)
    assert difference(row(0.5), row(0.4), "diversity.pairwise").low is None
    found = {name: row(0.5) for name in ("four steps", "distilled, unguided")}
    claim = judged(found)["four steps are nearly enough, without guidance"]
    assert claim["status"] == "not shown" and [part["holds"] for part in claim["parts"]] == [True, False]
    record = {"budget": "hour", "machine": "m", "hours": 1.0, "claims": [claim], "rows": {}}
    assert "diversity(four steps) - 0.8 diversity(distilled, unguided) = +0.200, of one seed |" in markdown(record)


def judged(found):
    return {claim.claim.split(":")[0]: claim.judge(found, hours=8) for claim in CLAIMS}


def test_a_claim_is_shown_only_where_all_of_its_parts_hold_and_not_run_where_a_row_is_missing():
    better, worse = row(0.7, 0.71, 0.72, distance=0.5), row(0.5, 0.51, 0.49)
    found = {"distilled": better, "output only": row(0.6, 0.61, 0.6), "alone": worse}
    assert judged(found)["distillation helps"]["status"] == "shown"
    found["output only"] = row(0.7, 0.72, 0.71)
    verdict = judged(found)["distillation helps"]
    assert verdict["status"] == "not shown" and [part["holds"] for part in verdict["parts"]] == [False, True, True]
    del found["alone"]
    assert judged(found)["distillation helps"]["status"] == "not run (needs 8 h)"
    assert judged(found)["distillation helps"]["missing"] == ["alone"]


def test_near_the_teacher_is_nineteen_twentieths_of_his_score_less_the_margin():
    teacher, near, far = row(0.8), row(0.78, 0.77, 0.79), row(0.70, 0.71, 0.69)
    claim = "the student comes near to its teacher"
    assert judged({"teacher": teacher, "distilled": near})[claim]["status"] == "shown"
    assert judged({"teacher": teacher, "distilled": far})[claim]["status"] == "not shown"


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_trial_of_a_budget_has_a_config_and_a_folder_of_its_own(budget, tmp_path):
    runs = Runs(BUDGETS[budget], tmp_path)
    trials = [(name, seed) for name in TRIALS for seed in runs.seeds(name)]
    folders = {runs.workdir(*trial) for trial in trials}
    assert len(folders) == len(trials)
    moved = Runs(BUDGETS[budget], tmp_path / "elsewhere")
    assert {folder.name for folder in folders} == {moved.workdir(*trial).name for trial in trials}
    longer = dataclasses.replace(BUDGETS[budget], steps={**BUDGETS[budget].steps, "clip": 77})
    assert not folders & {Runs(longer, tmp_path).workdir(*trial) for trial in trials}, "all begin with the text encoder"


def test_the_ladder_of_the_shapes_world_has_eight_networks_and_ends_smaller_than_it_began(tmp_path):
    networks = ladder_networks("patches")
    assert len(set(networks.values())) == 8
    runs = Runs(BUDGETS["night"], tmp_path)
    assert {step: build(UNetConfig, runs.config(f"ladder {step}").unet) for step in networks} == networks
    smoke = ladder_networks("runlocal")
    times = milliseconds({step: smoke[step] for step in ("A", "G")}, rounds=1, batch=1)
    assert set(times) == {"A", "G"} and all(ms > 0 for ms in times.values())


def test_nothing_is_begun_after_the_deadline_and_the_table_says_what_is_missing(tmp_path):
    runs = Runs(BUDGETS["hour"], tmp_path, deadline=-math.inf)
    record = shapes_claims.report(runs, "hour")
    assert not list(tmp_path.iterdir()) and not record["rows"]
    assert markdown(record).count(f"not run (needs {shapes_claims.HOURS['night']:g} h)") == len(CLAIMS)


def test_processes_that_have_a_seed_each_make_that_alone_and_find_what_the_others_have_made(tmp_path, monkeypatch):
    made = []

    class Fake:
        def __init__(self, config, folder):
            self.config = config

        def train(self):
            made.append(self.config.seed)

    numbers = row(0.5)[0]
    monkeypatch.setattr(shapes_claims, "Experiment", Fake)
    monkeypatch.setattr(shapes_claims, "parameters", lambda state: 7)
    monkeypatch.setattr(shapes_claims.experiment, "evaluate", lambda *_, **__: numbers)
    of_one = Runs(BUDGETS["night"], tmp_path, only=[1]).all()
    assert set(made) == {0, 1} and made.count(0) == 2  # what all seeds share: CLIP and the teacher
    assert len(of_one["alone"]) == len(of_one["four steps"]) == 1 and "ladder A" not in of_one
    made.clear()
    of_two = Runs(BUDGETS["night"], tmp_path, only=[2]).all()
    assert set(made) == {2} and len(of_two["alone"]) == 2
    next(Runs(BUDGETS["night"], tmp_path).workdir("alone", 2).glob("score-*.json")).unlink()
    later = Runs(BUDGETS["night"], tmp_path, deadline=-math.inf).all()
    assert len(later["alone"]) == len(later["distilled"]) == 1, "rows are compared seed by seed"


def test_the_table_gives_mean_and_spread_of_the_seeds():
    record = {"budget": "night", "machine": "m", "hours": 2.0, "claims": [], "rows": {}}
    record["rows"]["alone"] = shapes_claims._summary(row(0.4, 0.5, 0.6))
    assert record["rows"]["alone"]["score.overall.spread"] == pytest.approx(np.std([0.4, 0.5, 0.6], ddof=1))
    assert "| alone | 1 | 0.500 ± 0.100 | 0.500 ± 0.000 |" in markdown(record)


def test_a_budget_that_trains_together_gives_all_seeds_of_a_trial_to_one_program(tmp_path, monkeypatch):
    programs = []

    class Fake:
        def __init__(self, config, folder):
            self.folder = folder

        def train(self):
            return programs.append([self.folder.name.rpartition("-")[0]])

    def train_together(experiments, workdir):
        programs.append([made.folder.name.rpartition("-")[0] for made in experiments])
        return [None] * len(experiments)

    monkeypatch.setattr(shapes_claims, "Experiment", Fake)
    monkeypatch.setattr(shapes_claims.experiment, "train_together", train_together)
    monkeypatch.setattr(shapes_claims, "parameters", lambda state: 7)
    runs = Runs(BUDGETS["gpu"], tmp_path)
    folders = [runs.train("four steps", seed) for seed in runs.seeds("four steps")]
    assert programs == [["clip"], ["teacher"], ["distilled"] * 3, ["four_steps"] * 3]
    assert len(set(folders)) == 3 and all((folder / "trained.json").exists() for folder in folders)
