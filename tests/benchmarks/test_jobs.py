"""Jobs are made in an order that what they need allows: one after another, or several at a time."""

import math
import sys
import time
import types

import pytest

from benchmarks import jobs
from benchmarks.jobs import Job, make_all, make_at_once


class Errands:
    """Jobs `{name: names of those that it needs}`, each of which leaves a file of its name."""

    def __init__(self, root, needs):
        self.root, self.names = root, needs

    def jobs(self):
        return [self.job(name) for name in self.names]

    def job(self, name):
        return Job("score" if name.startswith("score") else "train", name, (0,))

    def needs(self, job):
        return [self.job(name) for name in self.names[job.name]]

    def done(self, job):
        return (self.root / job.name).exists()

    def do(self, job):
        (self.root / job.name).touch()

    def command(self, job):
        """A process that goes on for a while after its file is there."""
        files = [str(self.root / job.name), str(self.root / f"{job.name}.ended")]
        code = f"import time; open({files[0]!r}, 'w'); time.sleep(0.4); open({files[1]!r}, 'w')"
        return [sys.executable, "-S", "-c", code]

    def log_file(self, job):
        return self.root / "logs" / job.name

    def ended(self, job):
        return (self.root / f"{job.name}.ended").exists()


@pytest.fixture
def clock(monkeypatch):
    """What `time.monotonic` says."""
    now = [0.0]
    fake = types.SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr(jobs, "time", fake)
    return now


def quiet(text):
    pass


def test_a_job_is_told_to_another_process_as_text():
    job = Job("train", "four steps", (0, 2))
    assert Job.from_json(job.to_json()) == job and str(job) == "train four steps, seed 0, 2"


def test_what_is_made_one_after_another_is_not_made_again_and_none_is_begun_after_the_deadline(tmp_path, clock):
    class Slow(Errands):
        def do(self, job):
            super().do(job)
            clock[0] += 6

    runs, said = Slow(tmp_path, {"made": [], "a": [], "b": [], "c": []}), []
    runs.do(Job("train", "made", (0,)))
    clock[0] = 0
    make_all(runs, deadline=10, say=said.append)
    assert [runs.done(job) for job in runs.jobs()] == [True, True, True, False]
    assert said == ["\n== train a, seed 0 ==", "\n== train b, seed 0 =="]


def test_as_many_processes_run_at_once_as_are_asked_for_and_each_begins_when_what_it_needs_has_ended(tmp_path):
    runs = Errands(tmp_path, {"made": [], "a": [], "b": ["a"], "c": ["a", "made"], "d": ["a"], "e": ["b"]})
    runs.do(Job("train", "made", (0,)))
    begun, at_once, too_early, said = [], [], [], []

    def command(job):
        too_early.extend(other for other in runs.needs(job) if other.name != "made" and not runs.ended(other))
        begun.append(job)
        at_once.append(sum(not runs.ended(other) for other in begun))
        return runs.command(job)

    assert make_at_once(runs, 2, math.inf, command, say=said.append) == []
    assert sorted(begun, key=str) == runs.jobs()[1:] and all(map(runs.ended, begun))
    assert max(at_once) == 2 and not too_early
    assert len(said) == 5 and all(" done in " in line for line in said)


def test_a_score_is_begun_as_soon_as_it_can_be_and_a_training_not_before_an_earlier_one(tmp_path):
    runs, begun = Errands(tmp_path, {"a": [], "b": ["a"], "c": [], "score made": [], "score a": ["a"]}), []

    def command(job):
        begun.append(job.name)
        return runs.command(job)

    assert make_at_once(runs, 2, math.inf, command, say=quiet) == []
    assert begun == ["a", "score made", "b", "c", "score a"]


@pytest.mark.parametrize(("code", "says"), [("raise SystemExit('no such colour')", "no such colour"), ("pass", "")])
def test_a_job_that_fails_or_leaves_nothing_is_reported_and_what_needs_it_is_not_begun(tmp_path, code, says):
    needs = {"bad": [], "score bad": ["bad"], "after bad": ["bad"], "later": ["after bad"]}
    runs, said = Errands(tmp_path, {**needs, "good": [], "after good": ["good"]}), []

    def command(job):
        fails = [sys.executable, "-S", "-c", code]
        return fails if job.name == "bad" else runs.command(job)

    assert make_at_once(runs, 1, math.inf, command, say=said.append) == [Job("train", "bad", (0,))]
    assert {job.name for job in runs.jobs() if runs.done(job)} == {"good", "after good"}
    assert "train bad, seed 0: FAILED" in said[0] and says in said[1]


def test_no_process_is_begun_after_the_deadline_and_those_begun_before_come_to_their_end(tmp_path, clock):
    runs = Errands(tmp_path, {"a": [], "b": [], "c": []})

    def command(job):
        clock[0] += 6
        return runs.command(job)

    assert make_at_once(runs, 3, deadline=10, command=command, say=quiet) == []
    assert [runs.ended(job) for job in runs.jobs()] == [True, True, False]
