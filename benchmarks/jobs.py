"""Work in pieces that need each other: made one after another, or several at a time in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece that one process makes.

    Attributes:
        what: "train", "score", or "draw" what several trainings begin with.
        name: of what is trained.
        seeds: for which.
    """

    what: str
    name: str
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.what} {self.name}, seed {', '.join(map(str, self.seeds))}"

    def to_json(self) -> str:
        """As one argument of a command."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        what, name, seeds = json.loads(text)
        return cls(what, name, tuple(seeds))


class Work(Protocol):
    """What there is to do, and what of it is done."""

    def jobs(self) -> list[Job]:
        """All, each after those that it needs."""
        ...

    def needs(self, job: Job) -> list[Job]:
        """The jobs that must be done before."""
        ...

    def done(self, job: Job) -> bool:
        """Whether all that it makes is there."""
        ...

    def do(self, job: Job) -> None:
        """Makes it, or what of it is not there."""
        ...

    def log_file(self, job: Job) -> pathlib.Path:
        """What a job says that is made in a process of its own."""
        ...


def make_all(work: Work, deadline: float, say: Callable[[str], None] = print) -> None:
    """Makes jobs one after another in this process; none is begun after `deadline` (`time.monotonic`)."""
    for job in work.jobs():
        if not work.done(job) and time.monotonic() < deadline:
            say(f"\n== {job} ==")
            work.do(job)


def make_at_once(
    work: Work, count: int, deadline: float, command: Callable[[Job], Sequence[str]], say: Callable[[str], None] = print
) -> list[Job]:
    """Makes jobs `count` at a time, each in a process of its own. What is scored begins as soon as it is trained;
    the others begin in their order, so that none takes the machine from one that more depends on.

    Args:
        work: what there is to do.
        count: processes at once.
        deadline: none is begun after it, on the clock of `time.monotonic`.
        command: what makes a job.
        say: told of every end.

    Returns:
        The jobs that failed; those that need them are not begun.
    """
    waiting = [job for job in work.jobs() if not work.done(job)]
    running: dict[Job, tuple[subprocess.Popen, float]] = {}
    failed: list[Job] = []
    while True:
        for job in [job for job in running if running[job][0].poll() is not None]:
            process, began = running.pop(job)
            well = process.returncode == 0 and work.done(job)
            say(f"{job}: {'done' if well else 'FAILED'} in {time.monotonic() - began:.0f} s")
            if not well:
                failed.append(job)
                waiting = _without(waiting, job, work)
                log = work.log_file(job)
                say(f"  its output is in {log}; the end of it:\n{log.read_text(errors='replace')[-2000:]}")
        held = False
        for job in list(waiting):
            if len(running) == count or time.monotonic() > deadline:
                break
            ready = all(work.done(other) and other not in running for other in work.needs(job))
            if ready and (job.what == "score" or not held):
                waiting.remove(job)
                running[job] = (_begin(command(job), work.log_file(job)), time.monotonic())
            else:
                held |= job.what != "score"
        if not running:
            return failed
        time.sleep(0.2)


def _without(waiting: Sequence[Job], job: Job, work: Work) -> list[Job]:
    """The jobs that do not need `job`, nor one that needs it."""
    lost = {job}
    for other in waiting:
        lost |= {other} if lost & set(work.needs(other)) else set()
    return [other for other in waiting if other not in lost]


def _begin(command: Sequence[str], log: pathlib.Path) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
