"""What SnapGen claims of its method, put to the test in the shapes world: one table.

    python -m benchmarks.shapes_claims --budget=ci        # the machinery alone, in minutes; its numbers mean nothing
    python -m benchmarks.shapes_claims --budget=hour      # one seed of distillation and four steps, single objects
    python -m benchmarks.shapes_claims --budget=night     # three seeds of these, longer, and one of the ladder
    python -m benchmarks.shapes_claims --budget=gpu       # the same, three seeds of all, on a GPU
    python -m benchmarks.shapes_claims --budget=world     # of most, at full length in the whole world, on a GPU
    python -m benchmarks.shapes_claims --budget=night --hours=2     # as far as it comes in that time; run it again
    python -m benchmarks.shapes_claims --budget=night --jobs=2      # two trials at a time, each in its own process

What is trained is in `shapes_trials.py`; here is what is asked of it. On a GPU all seeds of a trial are one program,
whose convolutions XLA tries for minutes unless XLA_FLAGS=--xla_gpu_autotune_level=0; four jobs at a time keep it busy.
A row is `shown`, `not shown`, or `not run (needs N h)`. "At equal or better" means that the lower 95% bound of the
difference is at least -0.03: by Student's t over seeds, with a single seed prompt by prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

from benchmarks.jobs import Job, make_all, make_at_once
from benchmarks.measuring import machine
from benchmarks.shapes_trials import (
    BUDGETS,
    SHARED,
    TRIALS,
    Numbers,
    Rows,
    Runs,
    ladder_networks,
    milliseconds,
    multiply_adds,
)
from snapgen_jax.networks.counting import STEPS
from snapgen_jax.process import prepare

RESULTS = pathlib.Path(__file__).parent / "results"
MARGIN = -0.03
MORE = 1e-6  # least lower bound of what is to be better: a tie shows nothing
RECORDED = ("night", "gpu")  # the budgets that are judged by, first the one that needs no GPU
Seeds = Mapping[str, Numbers]


# --- what is claimed -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two rows in one number: its mean over seeds, and the lower bound that it exceeds with 95%; None for a single
    seed of a number that single prompts have none of."""

    mean: float
    low: float | None


def difference(a: Seeds, b: Seeds, key: str, factor: float = 1.0) -> Difference:
    """`a - factor b` over the seeds that both rows have; of a single one, over the prompts that both were asked for."""
    seeds = sorted(a.keys() & b.keys())
    values = np.array([a[seed][key] - factor * b[seed][key] for seed in seeds])
    if len(seeds) == 1:
        first, second = (row[seeds[0]].get(f"{key}.each") for row in (a, b))
        if first is None or second is None:
            return Difference(float(values[0]), None)
        values = np.array(first) - factor * np.array(second)
    spread = stats.t.ppf(0.95, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Difference(float(values.mean()), float(values.mean() - spread))


@dataclasses.dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        claim: what is to be seen.
        parts: `(what is compared, difference, least lower bound)`: all must hold.
        rows: the rows that it needs.
    """

    claim: str
    rows: tuple[str, ...]
    parts: Callable[[Rows], list[tuple[str, Difference, float]]]

    def judge(self, found: Rows) -> dict[str, Any]:
        """Its line of the table; where rows are missing, with the budget that makes them."""
        missing = [row for row in self.rows if row not in found]
        if missing or not set.intersection(*(set(found[row]) for row in self.rows)):  # no seed has all of them
            groups = {TRIALS[row.partition(",")[0]].group for row in self.rows}
            name = next(name for name in RECORDED if groups <= BUDGETS[name].steps.keys())
            status = f"not run (needs {BUDGETS[name].hours:g} h)"
            return {"claim": self.claim, "status": status, "missing": missing, "budget": name}
        parts = [
            {
                "compared": text,
                "mean": d.mean,
                "low": d.low,
                "needed": least,
                "holds": d.low is not None and d.low >= least,
            }
            for text, d, least in self.parts(found)
        ]
        shown = all(part["holds"] for part in parts)
        return {"claim": self.claim, "status": "shown" if shown else "not shown", "parts": parts}


Part = Callable[[Rows], tuple[str, Difference, float]]


def _more(a: str, b: str, key: str, factor: float = 1.0, least: float = MORE) -> Part:
    """`a` exceeds `factor` times `b` in a number that is better when larger."""
    title, times = TITLES[key], "" if factor == 1 else f"{factor:g} "
    return lambda found: (f"{title}({a}) - {times}{title}({b})", difference(found[a], found[b], key, factor), least)


def _less(a: str, b: str, key: str) -> Part:
    """`a` stays below `b` in a number that is better when smaller."""
    return lambda found: (f"{TITLES[key]}({b}) - {TITLES[key]}({a})", difference(found[b], found[a], key), MORE)


def _fewer(a: str, b: str, key: str, factor: float = 1.001) -> Part:
    """`a` has less than the `factor`th part of `b` of what is known exactly, on one machine."""

    def compare(found: Rows) -> tuple[str, Difference, float]:
        seed = min(found[a].keys() & found[b].keys())
        ratio = found[b][seed][key] / found[a][seed][key]
        return f"{TITLES[key]}({b}) / {TITLES[key]}({a})", Difference(ratio, ratio), factor

    return compare


def _claim(claim: str, rows: Sequence[str], *parts: Part) -> Claim:
    return Claim(claim, tuple(rows), lambda found: [part(found) for part in parts])


SCORE, HELD_OUT, FRECHET, DIVERSITY = "score.overall", "score.heldout", "frechet.distance", "diversity.pairwise"
TITLES = {
    "parameters": "parameters",
    "multiply_adds": "MMAC",
    "milliseconds": "ms",
    SCORE: "score",
    HELD_OUT: "held-out",
    FRECHET: "Frechet",
    DIVERSITY: "diversity",
}
CLAIMS = (
    _claim(
        "the ladder ends at a network that is smaller and faster, with an equal or better score",
        [f"ladder {step.name}" for step in STEPS],
        _more("ladder G", "ladder A", SCORE, least=MARGIN),
        *(_fewer("ladder G", "ladder A", key) for key in ("parameters", "multiply_adds", "milliseconds")),
    ),
    # Guidance trades the likeness of all images to the data for what each shows: likeness is compared without it.
    _claim(
        "distillation helps: output and features > output alone > no teacher",
        ["distilled", "output only", "alone", "distilled, unguided", "alone, unguided"],
        _more("distilled", "output only", SCORE),
        _more("output only", "alone", SCORE),
        _more("distilled", "alone", HELD_OUT),
        _less("distilled, unguided", "alone, unguided", FRECHET),
    ),
    _claim(
        "timestep-aware scaling helps, against a fixed share and against none",
        ["distilled", "fixed share", "no scaling"],
        _more("distilled", "fixed share", SCORE),
        _more("distilled", "no scaling", SCORE),
    ),
    _claim(
        "the student comes near to a teacher several times its size",
        ["distilled", "teacher"],
        _more("distilled", "teacher", SCORE, 0.95, MARGIN),
        _fewer("distilled", "teacher", "parameters", 3.0),
    ),
    _claim(
        "four steps are nearly enough, without guidance",
        ["four steps", "distilled, unguided"],
        _more("four steps", "distilled, unguided", SCORE, 0.95, MARGIN),
        _more("four steps", "distilled, unguided", DIVERSITY, 0.8, 0.0),
    ),
    _claim(
        "few-step distillation does it: undistilled, without adversary and without teacher are worse",
        ["four steps", "distilled, 4 steps", "no adversary", "no teacher"],
        _more("four steps", "distilled, 4 steps", SCORE),
        _more("four steps", "no adversary", SCORE),
        _more("four steps", "no teacher", SCORE),
    ),
    _claim(
        "bfloat16 costs no score",
        ["alone in bfloat16", "alone"],
        _more("alone in bfloat16", "alone", SCORE, least=MARGIN),
    ),
)


# --- the table -------------------------------------------------------------------------------------------------------


def measured(rows: Rows, arg: str) -> Rows:
    """The rows, of the ladder with what its networks cost."""
    networks = {f"ladder {name}": network for name, network in ladder_networks(arg).items()}
    present = {name: network for name, network in networks.items() if name in rows}
    times = milliseconds(present)
    known = {
        row: {"multiply_adds": multiply_adds(network), "milliseconds": times[row]} for row, network in present.items()
    }
    return {row: {seed: {**one, **known.get(row, {})} for seed, one in seeds.items()} for row, seeds in rows.items()}


def read_records(paths: Sequence[pathlib.Path], runs: Runs) -> dict[str, dict[str, Any]]:
    """Earlier records of the runs' budget, by name.

    Raises:
        ValueError: one is no record, of other numbers of updates, or of a seed that is made here or is in another: two
            runs of one seed begin and learn alike, and are not two.
    """
    records, updates = {}, runs.budget.steps
    seen = {str(seed): "this run" for seed in runs.seeds("alone")}
    for path in paths:
        try:
            record = json.loads(path.read_text())
            other = {group: steps for group, steps in record["updates"].items() if updates.get(group) != steps}
            seeds = {seed for seeds in record["per_seed"].values() for seed in seeds}
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: {error!r}; join a .json that this command wrote") from error
        if other:
            raise ValueError(f"{path} has other updates than this budget: {other}; join records of one budget")
        if twice := {seed: seen[seed] for seed in seeds & seen.keys()}:
            raise ValueError(f"{path} has seeds that are known: {twice}; leave it out, or make others with --seed")
        seen |= dict.fromkeys(seeds, str(path))
        records[path.stem] = record
    return records


def joined(rows: Rows, records: Mapping[str, Mapping[str, Any]]) -> Rows:
    """The rows, and as further seeds those of earlier records."""
    both = {row: dict(seeds) for row, seeds in rows.items()}
    for record in records.values():
        for row, seeds in record["per_seed"].items():
            both.setdefault(row, {}).update(seeds)
    return both


def report(runs: Runs, name: str, records: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """All that is known of a budget, here and in earlier records of it, see `read_records`."""
    records = records or {}
    own = measured(runs.rows(), runs.budget.arg)
    found = joined(own, records)
    return {
        "budget": name,
        "machine": "; ".join([machine(), *(f"{other}: {record['machine']}" for other, record in records.items())]),
        "claims": [claim.judge(found) for claim in CLAIMS],
        "rows": {row: _summary(_trained(row, seeds)) for row, seeds in found.items()},
        "per_seed": {row: {seed: _kept(one) for seed, one in seeds.items()} for row, seeds in own.items()},
        "updates": {group: steps for group, steps in runs.budget.steps.items() if steps is not None},
        "hours": runs.seconds() / 3600,
    }


def _trained(row: str, seeds: Seeds) -> list[Numbers]:
    """The trainings of a row: that which the seeds of a machine share stands in each of them, and is one."""
    kept = [_kept(numbers) for numbers in seeds.values()]
    return [numbers for i, numbers in enumerate(kept) if row not in SHARED or numbers not in kept[:i]]


def _kept(numbers: Numbers) -> Numbers:
    return {key: numbers[key] for key in TITLES if key in numbers}


def _summary(per_seed: Sequence[Numbers]) -> dict[str, Any]:
    values = {key: np.array([numbers[key] for numbers in per_seed]) for key in per_seed[0]}
    varying = (SCORE, HELD_OUT, FRECHET, DIVERSITY)
    spread = {f"{key}.spread": float(values[key].std(ddof=1)) for key in varying if len(per_seed) > 1}
    return {"seeds": len(per_seed), **{key: float(v.mean()) for key, v in values.items()}, **spread}


def markdown(record: Mapping[str, Any]) -> str:
    """The claims, and the rows that they are judged by."""
    lines = [f"Budget `{record['budget']}`, {record['machine']}, {record['hours']:.1f} h of training here.", ""]
    lines += ["| claim | seen | status |", "|---|---|---|"]
    for claim in record["claims"]:
        seen = "; ".join(
            f"{part['compared']} = {part['mean']:+.3f}, "
            + ("of one seed" if part["low"] is None else f"above {part['low']:+.3f}")
            for part in claim.get("parts", [])
        )
        seen = f"`--budget={claim['budget']}` makes it" if "budget" in claim else seen
        lines.append(f"| {claim['claim']} | {seen} | {claim['status']} |")
    columns = {key: title for key, title in TITLES.items() if any(key in row for row in record["rows"].values())}
    titles = [*columns.values(), "seeds"]
    lines += ["", "| run | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, row in record["rows"].items():
        cells = [f"{int(row['parameters']):,}"]
        for key in list(columns)[1:]:
            spread = f" ± {row[f'{key}.spread']:.3f}" if f"{key}.spread" in row else ""
            digits = 1 if key in ("multiply_adds", "milliseconds") else 3
            cells.append(f"{row[key]:.{digits}f}{spread}" if key in row else "")
        lines.append(f"| {name} | " + " | ".join([*cells, str(row["seeds"])]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Trains, judges and stores. Returns 1 where a job failed."""
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=tuple(BUDGETS), required=True)
    parser.add_argument("--workdir", default="runs/shapes_claims", help="where the runs are kept")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin nothing after so many hours")
    parser.add_argument("--jobs", type=int, default=1, help="trials made at a time, each in a process of its own")
    parser.add_argument("--seed", type=int, action="append", help="make this seed alone; --join adds those of others")
    parser.add_argument("--together", action=argparse.BooleanOptionalAction, help="all seeds of a trial in one program")
    parser.add_argument("--depthwise", choices=("auto", "grouped", "shifted"), default="auto", help="form of it")
    parser.add_argument("--job", type=Job.from_json, help=argparse.SUPPRESS)  # what --jobs gives each process
    parser.add_argument("--join", type=pathlib.Path, action="append", default=[], help="a .json: its seeds count too")
    parser.add_argument("--out", default=str(RESULTS / "shapes_claims"), help="of the table: .json and .md")
    options = parser.parse_args()
    root = pathlib.Path(options.workdir).absolute()
    deadline = time.monotonic() + 3600 * options.hours
    if options.jobs > 1 or options.job:  # they share an accelerator, and what they compile
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
    on_gpu = jax.default_backend() == "gpu"
    together = on_gpu if options.together is None else options.together
    machine_choices = {"together": together, "images_at_once": 128 if on_gpu else 16, "depthwise": options.depthwise}
    runs = Runs(BUDGETS[options.budget], root, only=options.seed, **machine_choices)
    if options.job:
        runs.do(options.job)
        return 0
    try:
        records = read_records(options.join, runs)
    except ValueError as error:
        parser.error(f"--join: {error}")
    failed = []
    if options.jobs > 1:
        asked = [
            "--budget",
            options.budget,
            "--workdir",
            str(root),
            f"--{'' if together else 'no-'}together",
            f"--depthwise={options.depthwise}",
            *(f"--seed={seed}" for seed in options.seed or ()),
        ]

        def command(job: Job) -> list[str]:
            return [sys.executable, "-m", "benchmarks.shapes_claims", *asked, "--job", job.to_json()]

        failed = make_at_once(runs, options.jobs, deadline, command)
    else:
        make_all(runs, deadline)
    record = report(runs, options.budget, records)
    out = pathlib.Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown(record))
    print("\n" + markdown(record))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
