"""The command: what it makes, with which choices, and what it leaves."""

import sys

import pytest

from benchmarks.claims import runner
from benchmarks.claims.landing import read_all
from benchmarks.claims.runs import Runs
from benchmarks.jobs import Job
from tests.benchmarks.claims.rows import SMALL, landed


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The command knows one small paper, and sets no variable that outlives it."""
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(runner, "prepare", lambda: None)
    monkeypatch.setattr(runner, "paper_names", lambda: ["small"])
    monkeypatch.setattr(runner, "paper", lambda name: {"small": SMALL}[name])


def test_nothing_is_begun_after_the_deadline_and_the_table_says_what_is_missing(small, tmp_path, capsys):
    asked = ["--budget=short", f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}", "--hours=-1"]
    assert runner.main(asked) == 0
    assert not (tmp_path / "runs").exists()
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("| not run (needs ") == len(SMALL.claims) and text in capsys.readouterr().out


def test_the_table_is_made_again_from_what_is_there(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Runs, "do", lambda self, job: pytest.fail("nothing is trained"))
    for trial in ("alone", "method"):
        landed(trial, **{"": 0.4 + 0.2 * (trial == "method")}).write(tmp_path / "small" / "night")
    assert runner.main(["--table", f"--out={tmp_path}"]) == 0
    assert "| shown | night |" in (tmp_path / "table.md").read_text()


def test_results_of_the_small_form_never_lie_beside_those_that_mean_something(small, tmp_path):
    root = tmp_path / "runs"
    assert runner.arguments(["--budget=ci", f"--workdir={root}"]).out == root / "ci"
    assert runner.arguments(["--budget=night"]).out == runner.RESULTS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--budget=week"], "invalid choice: 'week'"),
        ([], "choose --budget=short|night|gpu|world|ci, or --table"),
        (["smal", "--table"], "no paper smal; there are small"),
        (["--table", "--join=x"], "--join adds the seeds of one budget"),
    ],
)
def test_what_cannot_be_meant_is_refused(small, capsys, asked, message):
    with pytest.raises(SystemExit):
        runner.main(asked)
    assert message in capsys.readouterr().err


def test_seeds_of_another_machine_are_joined_and_stay(small, tmp_path, capsys):
    landed("alone", 1).write(tmp_path / "there" / "small" / "night")
    asked = ["--table", "--budget=night", f"--out={tmp_path / 'out'}", f"--join={tmp_path / 'there'}"]
    assert runner.main(asked) == 0
    assert [one.seed for one in read_all(tmp_path / "out" / "small" / "night")] == [1]
    assert runner.main(asked) == 2 and "the seed of alone-1.json is known" in capsys.readouterr().err


def test_a_process_that_is_given_a_job_makes_it_alone_and_with_the_choices_of_its_parent(
    small, tmp_path, monkeypatch, capsys
):
    given, made = [Job("train", "method", (0, 1, 2)), Job("score", "alone", (0,))], []
    monkeypatch.setattr(
        Runs, "do", lambda self, job: made.append((job, self.root, self.landed, self.together, self.depthwise))
    )
    commands = []

    def make_at_once(runs, count, deadline, command):
        commands.extend(command(job) for job in given)
        return given[:1]

    monkeypatch.setattr(runner, "make_at_once", make_at_once)
    out = tmp_path / "out"
    choices = ["--budget=gpu", f"--workdir={tmp_path / 'runs'}", "--together", "--depthwise=shifted"]
    assert runner.main([*choices, "--jobs=2", f"--out={out}"]) == 1, "a job failed"
    assert (out / "table.md").read_text().strip() in capsys.readouterr().out and not made
    for command in commands:
        assert command[:3] == [sys.executable, "-m", "benchmarks.claims"]
        assert runner.main(command[3:]) == 0
    assert made == [(job, tmp_path / "runs", out / "small" / "gpu", True, "shifted") for job in given]
