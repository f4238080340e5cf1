"""The table of claims: what counts as shown, and what the record keeps."""

import json
import math
import sys

import numpy as np
import pytest

from benchmarks import shapes_claims
from benchmarks.jobs import Job, make_all
from benchmarks.shapes_claims import CLAIMS, difference, markdown, measured, read_records, report
from benchmarks.shapes_trials import BUDGETS, Runs, multiply_adds
from snapgen_jax.networks.counting import STEPS
from snapgen_jax.networks.unet import UNetConfig


def row(*scores, heldout=0.5, diversity=1.0, distance=1.0, parameters=1):
    """`{seed: numbers}`; of four prompts, whose scores lie 0.1 apart."""
    common = {"score.heldout": heldout, "diversity.pairwise": diversity, "frechet.distance": distance}
    prompts = np.array([-0.15, -0.05, 0.05, 0.15])
    return {
        str(seed): {
            "score.overall": s,
            "score.overall.each": (s + prompts).tolist(),
            **common,
            "parameters": parameters,
            "seconds": 1.0,
        }
        for seed, s in enumerate(scores)
    }


def judged(found):
    return {claim.claim.split(":")[0]: claim.judge(found) for claim in CLAIMS}


def record_of(rows, claims=()):
    summaries = {name: shapes_claims._summary(list(seeds.values())) for name, seeds in rows.items()}
    return {"budget": "night", "machine": "m", "hours": 2.0, "claims": list(claims), "rows": summaries}


@pytest.fixture
def known(monkeypatch):
    """`{(trial, seed): score}` of what is there, however it is drawn from."""
    scores = {}

    def numbers(self, name, draw, seed):
        return row(scores[name, seed])["0"] if (name, seed) in scores else None

    monkeypatch.setattr(Runs, "numbers", numbers)
    return scores


# --- what is claimed -------------------------------------------------------------------------------------------------


def test_a_difference_is_taken_seed_by_seed_and_of_three_has_the_bound_of_students_t():
    found = difference(row(0.5, 0.6, 0.7), row(0.4, 0.4, 0.4), "score.overall")
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 2.919986 * 0.1 / math.sqrt(3), abs=1e-5)
    more, other = row(0.5, 0.6, 0.7, 0.9), dict(reversed(row(0.4, 0.5, 0.6).items()))  # the fourth has no counterpart
    assert difference(more, other, "score.overall").low == pytest.approx(0.1)
    assert difference(other, more, "score.overall").low == pytest.approx(-0.1)


def test_a_single_seed_is_judged_prompt_by_prompt_and_a_number_that_prompts_have_none_of_not_at_all():
    better, worse = row(0.5), row(0.4)
    assert difference(better, worse, "score.overall").low == pytest.approx(0.1), "each prompt by as much"
    better["0"]["score.overall.each"] = [0.4, 0.5, 0.5, 0.6]
    worse["0"]["score.overall.each"] = [0.5, 0.3, 0.5, 0.3]  # differences -0.1, 0.2, 0, 0.3
    spread = 2.353363 * np.std([-0.1, 0.2, 0.0, 0.3], ddof=1) / 2
    assert difference(better, worse, "score.overall").low == pytest.approx(0.1 - spread, abs=1e-5)
    halved = difference(better, worse, "score.overall", 0.5)
    assert halved.mean == pytest.approx(0.3)
    assert halved.low == pytest.approx(0.3 - 2.353363 * np.std([0.15, 0.35, 0.25, 0.45], ddof=1) / 2, abs=1e-5)
    assert difference(row(0.5), row(0.4), "diversity.pairwise").low is None
    found = {name: row(0.5) for name in ("four steps", "distilled, unguided")}
    claim = judged(found)["four steps are nearly enough, without guidance"]
    assert claim["status"] == "not shown" and [part["holds"] for part in claim["parts"]] == [True, False]
    table = markdown(record_of({}, [claim]))
    assert "diversity(four steps) - 0.8 diversity(distilled, unguided) = +0.200, of one seed |" in table


def test_a_claim_is_shown_only_where_all_of_its_parts_hold_and_not_run_where_a_row_is_missing():
    found = {
        "distilled": row(0.7, 0.71, 0.72, heldout=0.6),
        "output only": row(0.6, 0.61, 0.6),
        "alone": row(0.5, 0.51, 0.49, heldout=0.5),
        "distilled, unguided": row(0.4, 0.4, 0.4, distance=0.5),
        "alone, unguided": row(0.4, 0.4, 0.4, distance=0.7),
    }
    assert judged(found)["distillation helps"]["status"] == "shown"

    def held(**changed):
        verdict = judged({**found, **changed})["distillation helps"]
        assert verdict["status"] == "not shown"
        return [part["holds"] for part in verdict["parts"]]

    assert held(**{"output only": row(0.7, 0.72, 0.71)}) == [False, True, True, True]
    assert held(distilled=row(0.7, 0.71, 0.72, heldout=0.4)) == [True, True, False, True]
    assert held(**{"distilled, unguided": row(0.4, 0.4, 0.4, distance=0.8)}) == [True, True, True, False]
    del found["alone"]
    assert judged(found)["distillation helps"]["status"] == "not run (needs 10 h)"
    assert judged(found)["distillation helps"]["missing"] == ["alone"]
    found["alone"] = {"3": row(0.5)["0"]}
    assert judged(found)["distillation helps"]["status"] == "not run (needs 10 h)", "no seed has all rows"


def test_a_tie_shows_nothing_of_what_is_to_be_better():
    claims = [claim for claim in CLAIMS if "help" in claim.claim or "does it" in claim.claim]
    found = {name: row(0.0, 0.0, 0.0) for claim in claims for name in claim.rows}
    assert [claim.judge(found)["status"] for claim in claims] == ["not shown"] * 3


def test_near_the_teacher_is_nineteen_twentieths_of_his_score_less_the_margin_at_a_third_of_his_size():
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
        assert verdict["status"] == "not shown" and [part["holds"] for part in verdict["parts"]].count(False) == 1


# --- the table -------------------------------------------------------------------------------------------------------


def test_nothing_is_begun_after_the_deadline_and_the_table_says_what_is_missing(tmp_path):
    runs = Runs(BUDGETS["hour"], tmp_path)
    make_all(runs, deadline=-math.inf)
    record = report(runs, "hour")
    assert not list(tmp_path.iterdir()) and not record["rows"]
    table = markdown(record)
    assert (
        table.count(f"| `--budget=night` makes it | not run (needs {BUDGETS['night'].hours:g} h) |") == len(CLAIMS) - 1
    )
    assert f"| `--budget=gpu` makes it | not run (needs {BUDGETS['gpu'].hours:g} h) |" in table, "bfloat16"


def test_a_row_of_the_ladder_is_measured_and_no_other(monkeypatch):
    networks = {"A": UNetConfig.preset("smoke"), "G": UNetConfig.preset("smoke", units=2)}
    monkeypatch.setattr(shapes_claims, "ladder_networks", lambda arg: networks)
    monkeypatch.setattr(shapes_claims, "milliseconds", lambda configs: dict.fromkeys(configs, 2.5))
    found = measured({"alone": row(0.5, 0.6), "ladder G": row(0.4, 0.3)}, "runlocal")
    assert found["alone"] == row(0.5, 0.6) and set(found) == {"alone", "ladder G"}
    costs = {"multiply_adds": multiply_adds(networks["G"]), "milliseconds": 2.5}
    assert found["ladder G"] == {seed: {**one, **costs} for seed, one in row(0.4, 0.3).items()}


def test_the_table_gives_mean_and_spread_of_the_seeds():
    record = record_of({"alone": row(0.4, 0.5, 0.6)})
    assert record["rows"]["alone"]["score.overall.spread"] == pytest.approx(np.std([0.4, 0.5, 0.6], ddof=1))
    assert "| alone | 1 | 0.500 ± 0.100 | 0.500 ± 0.000 |" in markdown(record)


def test_the_table_has_multiply_adds_and_milliseconds_only_where_they_are_known():
    rows = {"alone": row(0.5)}
    assert "| run | parameters | score | held-out | Frechet | diversity | seeds |" in markdown(record_of(rows))
    rows["ladder G"] = {"0": {**row(0.4)["0"], "multiply_adds": 26.05, "milliseconds": 9.87}}
    table = markdown(record_of(rows))
    assert "| run | parameters | MMAC | ms | score | held-out | Frechet | diversity | seeds |" in table
    assert "| alone | 1 |  |  | 0.500 |" in table and "| ladder G | 1 | 26.1 | 9.9 | 0.400 |" in table


def test_the_record_keeps_the_numbers_of_each_seed(tmp_path, known):
    known.update({("alone", 0): 0.5, ("alone", 1): 0.7, ("teacher", 0): 0.8})
    record = json.loads(json.dumps(report(Runs(BUDGETS["night"], tmp_path), "night")))
    kept = {
        name: {seed: one["score.overall"] for seed, one in seeds.items()} for name, seeds in record["per_seed"].items()
    }
    assert kept["alone"] == {"0": 0.5, "1": 0.7} and kept["teacher"] == {"0": 0.8, "1": 0.8}
    for name, summary in record["rows"].items():
        seeds = list(record["per_seed"][name].values())
        assert summary["seeds"] == (1 if name == "teacher" else len(seeds)), "all seeds share the one teacher"
        means = summary.keys() & seeds[0].keys()
        assert "score.overall" in means == seeds[0].keys()
        assert all(summary[key] == pytest.approx(np.mean([one[key] for one in seeds])) for key in means)


def test_the_seeds_of_earlier_records_count_as_further_ones(tmp_path, known):
    known.update({("alone", 1): 0.6, ("alone", 2): 0.8, ("teacher", 0): 0.9})
    earlier = {**report(Runs(BUDGETS["night"], tmp_path, only=[1, 2]), "night"), "machine": "another"}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(earlier))
    known.clear()
    known.update({("alone", 0): 0.4, ("distilled", 0): 0.5})
    runs = Runs(BUDGETS["night"], tmp_path, only=[0])
    record = report(runs, "night", read_records([file], runs))
    assert record["rows"]["alone"]["seeds"] == 3 and record["rows"]["alone"]["score.overall"] == pytest.approx(0.6)
    assert record["rows"]["distilled"]["seeds"] == 1 and record["rows"]["teacher"]["seeds"] == 1
    assert set(record["per_seed"]) == {name for name in record["rows"] if not name.startswith("teacher")}, "its own"
    assert record["per_seed"]["alone"].keys() == {"0"}
    assert record["machine"].endswith("; gpu: another")


def test_a_record_that_cannot_be_joined_is_refused_with_the_reason(tmp_path, known):
    known.update({("alone", 0): 0.6})
    runs, file = Runs(BUDGETS["night"], tmp_path, only=[0]), tmp_path / "same.json"
    file.write_text(json.dumps(report(runs, "night")))
    with pytest.raises(ValueError, match=r"has seeds that are known: {'0': 'this run'}"):
        read_records([file], runs)
    other = Runs(BUDGETS["night"], tmp_path, only=[1])
    assert set(read_records([file], other)) == {"same"}
    with pytest.raises(ValueError, match=r"seeds that are known: {'0': '.*same.json'}"):
        read_records([file, file], other)
    with pytest.raises(ValueError, match="other updates than this budget"):
        read_records([file], Runs(BUDGETS["hour"], tmp_path, only=[1]))
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"join a \.json that this command wrote"):
        read_records([file], other)


def test_a_process_that_is_given_a_job_makes_it_alone_and_with_the_choices_of_its_parent(tmp_path, monkeypatch, capsys):
    given, made = [Job("train", "four steps", (0, 1, 2)), Job("score", "clip", (0,))], []
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # that they are as before in the end
    monkeypatch.setattr(shapes_claims, "prepare", lambda: None)
    monkeypatch.setattr(Runs, "do", lambda self, job: made.append((job, self.root, self.together, self.depthwise)))
    commands = []

    def make_at_once(runs, count, deadline, command):
        commands.extend(command(job) for job in given)
        return given[:1]

    monkeypatch.setattr(shapes_claims, "make_at_once", make_at_once)
    choices = ["--budget=gpu", f"--workdir={tmp_path / 'runs'}", "--together", "--depthwise=shifted"]
    monkeypatch.setattr(sys, "argv", ["shapes_claims", *choices, "--jobs=2", f"--out={tmp_path / 'table'}"])
    assert shapes_claims.main() == 1, "a job failed"
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out and not made
    for command in commands:
        assert command[:3] == [sys.executable, "-m", "benchmarks.shapes_claims"]
        monkeypatch.setattr(sys, "argv", command[2:])
        assert shapes_claims.main() == 0
    assert made == [(job, tmp_path / "runs", True, "shifted") for job in given]
