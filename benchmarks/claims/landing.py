"""Finished seeds as small files: `<out>/<paper>/<budget>/<trial>-<seed>.json`.

Each is written as soon as it is scored, so that a run that is stopped, here or on another machine, goes on after it.
Rows of two budgets are never compared. A folder of any other name, such as that of an earlier setting, is read like a
budget's, and made by none.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from benchmarks.claims.trials import BUDGETS, Paper
from snapgen_jax.training.files import write_whole

Rows = dict[str, dict[str, dict[str, Any]]]  # by row, then by seed


@dataclasses.dataclass(frozen=True)
class Landed:
    """A trial's seed, or a measurement.

    Attributes:
        trial: name of it.
        seed: 0 where all seeds share it.
        rows: {row: numbers}; "NAME.each" are those of the prompts.
        setting: fingerprint of its config, of those that it starts from and of how it is scored.
        machine: that scored it.
        commit: of the code; for a result from before these files, the one that recorded it.
        minutes: of training; None where only a total was kept.
        total_minutes: that total; the same in all files that it counts.
        updates: of the training; None for a measurement.
    """

    trial: str
    seed: int
    rows: Mapping[str, Mapping[str, Any]]
    setting: str
    machine: str
    commit: str
    minutes: float | None = None
    total_minutes: float | None = None
    updates: int | None = None

    def file_name(self) -> str:
        """Of its file."""
        return file_name(self.trial, self.seed)

    def write(self, folder: pathlib.Path) -> None:
        """Writes it whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in dataclasses.asdict(self).items())
        write_whole(epath.Path(folder / self.file_name()), "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: pathlib.Path) -> Landed:
        """The inverse of `write`.

        Raises:
            ValueError: the file is none of these.
        """
        try:
            landed = cls(**json.loads(path.read_text()))
            if landed.file_name() != path.name:
                raise ValueError(f"it holds {landed.file_name()}")
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}; it must be a file that `python -m benchmarks.claims` wrote") from error
        return landed


def file_name(trial: str, seed: int) -> str:
    """Of a landed file."""
    return f"{trial.replace(' ', '_')}-{seed}.json"


def read_all(folder: pathlib.Path) -> list[Landed]:
    """All files of a paper's budget, by name."""
    return [Landed.read(path) for path in sorted(folder.glob("*.json"))]


def groups(out: pathlib.Path, paper: str) -> list[str]:
    """The names of a paper's folders: the longest budget first, then those that are no budgets."""
    present = {path.name for path in (out / paper).iterdir() if path.is_dir()} if (out / paper).is_dir() else set()
    return [name for name in reversed(list(BUDGETS)) if name in present] + sorted(present - BUDGETS.keys())


def rows(landed: Sequence[Landed], paper: Paper) -> Rows:
    """The numbers by row and seed. What all seeds share, and what is measured once, stands in each of them."""
    once = {name for name, trial in paper.trials.items() if trial.shared} | set(paper.measures)
    found: Rows = {}
    for one in landed:
        if one.trial not in once:
            for row, numbers in one.rows.items():
                found.setdefault(row, {}).setdefault(str(one.seed), {}).update(numbers)
    everywhere = sorted({seed for seeds in found.values() for seed in seeds}) or ["0"]
    for one in landed:
        if one.trial in once:
            for row, numbers in one.rows.items():
                of_row = found.setdefault(row, {seed: {} for seed in everywhere})
                for seed in of_row:
                    of_row[seed] = {**of_row[seed], **numbers}
    return found


def join(others: Sequence[pathlib.Path], out: pathlib.Path, papers: Sequence[Paper], budget: str) -> list[Landed]:
    """Copies a budget's seeds from the results of other machines.

    What all seeds share is taken from the first that has it.

    Raises:
        ValueError: a folder holds none, a seed is known already, or its trial has another number of updates here. Two
            runs of one seed begin and learn alike, and are not two.
    """
    new: list[tuple[pathlib.Path, Landed]] = []
    known = {p.name: {one.file_name(): str(out) for one in read_all(out / p.name / budget)} for p in papers}
    for other in others:
        found = [(p, one) for p in papers for one in read_all(other / p.name / budget)]
        if not found:
            wanted = " or ".join(str(other / p.name / budget) for p in papers)
            raise ValueError(f"{other} has no results of the budget {budget!r}; there must be files in {wanted}")
        for of, one in found:
            trial, name = of.trials.get(one.trial), one.file_name()
            here = trial.effort[budget].updates if trial and budget in trial.effort else None
            if here is not None and one.updates != here:
                raise ValueError(f"{other}: {name} has {one.updates} updates, and this budget {here}; join its like")
            if name not in known[of.name]:
                known[of.name][name] = str(other)
                new.append((out / of.name / budget, one))
            elif trial is not None and not trial.shared:
                raise ValueError(
                    f"{other}: the seed of {name} is known from {known[of.name][name]}; leave it out, or make "
                    "others with --seed"
                )
    for folder, one in new:
        one.write(folder)
    return [one for _, one in new]
