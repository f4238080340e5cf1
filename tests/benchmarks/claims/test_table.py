"""One table over all papers: what a row says, and what it says where something is missing."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from benchmarks.claims import table
from benchmarks.claims.landing import Landed
from benchmarks.claims.trials import Effort, paper
from tests.benchmarks.claims.rows import SMALL, landed

STORED = pathlib.Path(__file__).parents[3] / "benchmarks/results/claims"


def write(out, *files, budget="night"):
    for one in files:
        one.write(out / "small" / budget)


def lines_of(text):
    return {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| small |")}


def test_a_row_that_is_missing_says_the_hours_that_it_still_needs_and_the_command(tmp_path):
    lines = lines_of(table.write([SMALL], tmp_path))
    # base 1,000 + alone 2,000 + method 2,000 updates of 0.4 s
    assert (
        "`python -m benchmarks.claims small --budget=short` makes it | not run (needs 0.6 h)"
        in lines["the method helps"]
    )
    # base 1,000 + alone 3 x 4,000 + rounded 3 x 4,000 updates of 0.01 s
    assert "--budget=gpu` makes it | not run (needs 0.1 h)" in lines["bfloat16 costs nothing"]
    control = lines["control, must fail: captions do not matter"]
    assert "not run (needs 0.3 h)" in control, "base and method alone"


def test_hours_are_those_of_what_is_not_landed_and_of_what_that_starts_from():
    def hours(*files):
        return table.hours_of(SMALL, "night", ["base", "alone", "method"], files)

    updates = 1_000 + 2 * 3 * 4_000
    assert hours() == pytest.approx(updates * 0.4 / 3600)
    assert hours(landed("alone", 0), landed("alone", 1)) == pytest.approx((updates - 8_000) * 0.4 / 3600)
    everything = [landed(name, seed) for name in ("alone", "method") for seed in range(3)]
    assert hours(*everything) == 0, "no row is missing that starts from the base"


def test_a_claim_is_judged_by_the_longest_budget_that_has_its_rows(tmp_path):
    write(tmp_path, landed("alone", **{"": 0.4}), landed("method", **{"": 0.6}), budget="short")
    write(tmp_path, landed("alone", **{"": 0.4}))
    line = lines_of(table.write([SMALL], tmp_path))["the method helps"]
    seen = "score(method) - score(alone) = +0.200, above +0.200 over 1 seed of 4 prompts"
    assert line.endswith(f"| {seen} | shown | short |")
    write(tmp_path, landed("method", **{"": 0.3}))
    line = lines_of(table.write([SMALL], tmp_path))["the method helps"]
    assert "= -0.100" in line and line.endswith("| not shown | night |")


def test_a_control_that_is_shown_is_said_to_be_wrong(tmp_path):
    write(tmp_path, landed("method", **{"": 0.6, "blind": 0.1}))
    lines = lines_of(table.write([SMALL], tmp_path))
    assert lines["control, must fail: captions do not matter"].endswith("| not shown | night |")
    write(tmp_path, landed("method", **{"": 0.6, "blind": 0.6}))
    lines = lines_of(table.write([SMALL], tmp_path))
    assert "| shown, but must fail: the measure sees nothing |" in lines["control, must fail: captions do not matter"]


def test_a_row_that_is_not_resolved_says_the_sample_that_would_resolve_it(tmp_path):
    few = landed("method", **{"": 0.6, "few": 0.6})
    wide = {**few.rows["method, few"], "score.overall.each": (0.6 + np.array([-0.3, 0.3, 0.3, -0.3])).tolist()}
    write(tmp_path, dataclasses.replace(few, rows={**few.rows, "method, few": wide}), landed("alone"))
    line = lines_of(table.write([SMALL], tmp_path))["few steps are enough"]
    assert "needs 1 seed of " in line
    assert "diversity(method, few) - diversity(alone) = +0.000, one number, no bound, needs 3 seeds" in line
    assert line.endswith("| not resolved | night |")


def test_the_rows_have_mean_and_spread_of_the_seeds_and_machines_commits_and_minutes(tmp_path):
    write(tmp_path, *(landed("alone", seed, **{"": s}) for seed, s in enumerate((0.4, 0.5, 0.6))), landed("teacher"))
    write(tmp_path, dataclasses.replace(landed("method", machine="another"), commit="beef"))
    text = table.write([SMALL], tmp_path)
    assert "## small, night" in text
    assert "| alone | 1 | 0.500 ± 0.100 | 0.500 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 3 |" in text
    assert "| teacher | 1 | 0.500 | 0.500 | 1.000 | 1.000 | 1 |" in text, "all seeds share the one teacher"
    assert "150 minutes of training. Machines: another; m." in text and "Commits: beef, c0ffee." in text


def test_a_total_that_was_kept_for_several_trainings_counts_once(tmp_path):
    files = [dataclasses.replace(landed("alone", n), minutes=None, total_minutes=600.0) for n in range(3)]
    write(tmp_path, *files, landed("method"))
    assert "630 minutes of training." in table.write([SMALL], tmp_path)


def test_costs_have_columns_only_where_they_are_known(tmp_path):
    write(tmp_path, landed("alone"), landed("method"))
    assert "| run | parameters | score | held-out | Frechet | diversity | seeds |" in table.write([SMALL], tmp_path)
    write(tmp_path, Landed("costs", 0, {"alone": {"multiply_adds": 26.05, "milliseconds": 9.87}}, "", "m", "c"))
    text = table.write([SMALL], tmp_path)
    assert "| run | parameters | MMAC | ms | score | held-out | Frechet | diversity | seeds |" in text
    assert "| alone | 1 | 26.1 | 9.9 | 0.500 |" in text and "| method | 1 |  |  | 0.500 |" in text


def test_the_table_holds_all_papers_whichever_was_judged_last(tmp_path):
    other = dataclasses.replace(SMALL, name="other", trials={**SMALL.trials})
    table.write([SMALL], tmp_path)
    text = table.write([other], tmp_path)
    assert {line.split(" | ")[0] for line in text.splitlines() if "the method helps" in line} == {"| small", "| other"}


def test_the_stored_table_is_what_the_stored_files_give(tmp_path):
    """`--table` rebuilds it without training; whoever adds a result or a claim runs that."""
    shutil.copytree(STORED, tmp_path / "claims")
    (tmp_path / "claims" / "table.md").unlink()
    papers = [paper(path.stem) for path in STORED.glob("*.json")]
    assert papers and table.write(papers, tmp_path / "claims") == (STORED / "table.md").read_text()


def test_what_the_first_night_measured_is_kept(tmp_path):
    shutil.copytree(STORED / "snapgen" / "night_128", tmp_path / "snapgen" / "night_128")
    record = table.record(paper("snapgen"), tmp_path)
    rows = record["groups"]["night_128"]["rows"]
    assert rows["distilled"]["score.overall"] == pytest.approx(0.8047, abs=1e-4) and rows["distilled"]["seeds"] == 3
    assert rows["teacher"]["seeds"] == 1 and rows["ladder A"]["milliseconds"] == pytest.approx(28.63, abs=0.01)
    assert record["groups"]["night_128"]["minutes"] == pytest.approx(621.4)
    statuses = {claim["claim"].split(":")[0]: claim["status"] for claim in record["claims"]}
    assert statuses["timestep-aware scaling helps, against a fixed share and against none"] == "shown"
    assert statuses["four steps are nearly enough, without guidance"] == "shown"


def test_a_trial_whose_config_alone_knows_its_updates_needs_no_hours_that_are_known():
    trials = {
        **SMALL.trials,
        "alone": dataclasses.replace(SMALL.trials["alone"], effort={"gpu": Effort(None, 3), "night": Effort()}),
    }
    open_ended = dataclasses.replace(SMALL, trials=trials)
    assert table.hours_of(open_ended, "night", ["base", "alone"]) == pytest.approx(1_000 * 0.4 / 3600)
