"""What SnapGen claims of its method, put to the test in the shapes world: one table.

    python -m benchmarks.shapes_claims --budget=ci        # the machinery alone, in minutes; its numbers mean nothing
    python -m benchmarks.shapes_claims --budget=hour      # one seed of distillation and four steps, single objects
    python -m benchmarks.shapes_claims --budget=night     # three seeds of these, longer, and one of the ladder
    python -m benchmarks.shapes_claims --budget=gpu       # three seeds of all, full length, the whole world
    python -m benchmarks.shapes_claims --budget=night --hours=2     # as far as it comes in that time; run it again
    python -m benchmarks.shapes_claims --budget=night --seed=1      # one seed alone, while another process has another

Everything that a row needs is trained first, each run in a folder named after the hash of its config, so that a run is
never made twice and a stopped one goes on. A row is `shown`, `not shown`, or `not run (needs N h)`. "At equal or
better" means that the lower 95% bound of the difference is at least -0.03: over seeds by Student's t, with a single
seed over its prompts. Networks that all seeds share (CLIP, the teacher) are trained once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from scipy import stats

from snapgen_jax import experiment
from snapgen_jax.chain import parameters
from snapgen_jax.config import build, load_config, to_json
from snapgen_jax.data.prompts import CATEGORIES
from snapgen_jax.experiment import Experiment, prepare_workdir
from snapgen_jax.networks import unet
from snapgen_jax.networks.counting import STEPS, ladder
from snapgen_jax.networks.module import apply, for_platform, init
from snapgen_jax.networks.module import build as build_network
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.process import prepare
from snapgen_jax.training.files import write_whole

RESULTS = pathlib.Path(__file__).parent / "results"
CONFIGS = pathlib.Path("configs/shapes")
MARGIN = -0.03
UNGUIDED = {"guidance": 1.0}
Numbers = dict[str, float]


# --- what is trained -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        config: file under `configs/shapes`, without its ending.
        changes: overrides of it.
        earlier: {config key: name of the trial whose workdir is filled in}.
        group: whose number of updates and of seeds it has.
        draws: {row: options of the generator} to be scored.
    """

    config: str
    changes: tuple[str, ...] = ()
    earlier: Mapping[str, str] = dataclasses.field(default_factory=dict)
    group: str = "student"
    draws: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})


TEXT = {"text_workdir": "clip"}
TAUGHT = {**TEXT, "teacher.workdir": "teacher"}
FROM_DISTILLED = {**TAUGHT, "init_from": "distilled", "trunk_workdir": "distilled"}
TRIALS = {
    "clip": Trial("clip", group="clip", draws={}),
    "teacher": Trial("teacher", earlier=TEXT, group="teacher"),
    "alone": Trial("student", earlier=TEXT),
    "output only": Trial("student_distilled", ("feature_weight=0.0",), TAUGHT),
    "distilled": Trial(
        "student_distilled",
        earlier=TAUGHT,
        draws={"": {}, "unguided": UNGUIDED, "4 steps": {**UNGUIDED, "steps": 4}},
    ),
    "fixed share": Trial("student_distilled", ("scaling.alpha=constant",), TAUGHT),
    "no scaling": Trial("student_distilled", ("scaling.alpha=none",), TAUGHT),
    "with ratio": Trial("student_distilled", ("scaling.ratio=running",), TAUGHT),
    "four steps": Trial("student_few_step", earlier=FROM_DISTILLED, group="few-step"),
    "eight steps": Trial("student_few_step", ("sampling.steps=8",), FROM_DISTILLED, "few-step"),
    "no adversary": Trial("student_few_step", ("adversarial_weight=0.0",), FROM_DISTILLED, "few-step"),
    "no teacher": Trial("student_few_step", ("output_weight=0.0",), FROM_DISTILLED, "few-step"),
    **{f"ladder {step.name}": Trial("student", earlier=TEXT, group="ladder") for step in STEPS},
}
SHARED = {"clip", "teacher"}  # by all seeds


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of the table is made, and how well.

    Attributes:
        arg: of the configs: their forms on patches of pixels; "quick" has single objects only.
        steps: updates of each group; None as the config says. A group that is not here is not run.
        seeds: of each group; 1 unless named.
        per_category: prompts of each category of the score.
        categories: of the score.
        examples: images of the Frechet distance, and twice those of the diversity.
        together: trains all seeds of a trial in one program, for a machine that one of them leaves idle.
    """

    arg: str
    steps: Mapping[str, int | None]
    seeds: Mapping[str, int]
    per_category: int
    examples: int
    categories: tuple[str, ...] = CATEGORIES
    together: bool = False


FULL: dict[str, int | None] = dict.fromkeys(("clip", "teacher", "student", "few-step", "ladder"))
BUDGETS = {
    "ci": Budget("runlocal", FULL, {}, 2, 8),
    "hour": Budget(
        "quick",
        {"clip": 1_000, "teacher": 12_000, "student": 2_000, "few-step": 600},
        {},
        per_category=64,
        examples=256,
        categories=("single_object", "colours"),
    ),
    "night": Budget(
        "quick",
        {"clip": 1_000, "teacher": 12_000, "student": 4_000, "few-step": 1_000, "ladder": 4_000},
        {"student": 3, "few-step": 3},
        per_category=64,
        examples=512,
        categories=("single_object", "colours"),
    ),
    "gpu": Budget(
        "patches",
        {"clip": 12_000, "teacher": 60_000, "student": 34_400, "few-step": 12_000, "ladder": 34_400},
        {"student": 3, "few-step": 3, "ladder": 3},
        per_category=64,
        examples=512,
        together=True,
    ),
}
HOURS = {"ci": 0.1, "hour": 1.5, "night": 5.0, "gpu": 24.0}  # planned


class Runs:
    """The trained runs of a budget and their scores, made when they are asked for, and kept."""

    def __init__(
        self, budget: Budget, root: pathlib.Path, deadline: float = math.inf, only: Sequence[int] | None = None
    ):
        """`deadline`: on the clock of `time.monotonic`; nothing is begun after it. `only`: the seeds that are made
        here, so that several processes may share a budget."""
        self.budget, self.root, self.deadline, self.only = budget, root, deadline, only

    def seeds(self, name: str) -> range:
        """Those of a trial; none where the budget leaves it out."""
        group = TRIALS[name].group
        if group not in self.budget.steps:
            return range(0)
        return range(1 if name in SHARED else self.budget.seeds.get(group, 1))

    def workdir(self, name: str, seed: int = 0) -> pathlib.Path:
        """Where a trial is, named after its config, which names the trials before it."""
        text = to_json(self.config(name, seed)).replace(str(self.root), "")
        return self.root / f"{name.replace(' ', '_')}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def config(self, name: str, seed: int = 0) -> Any:
        """The config of a trial."""
        trial, budget = TRIALS[name], self.budget
        seed = 0 if name in SHARED else seed
        steps = budget.steps[trial.group]
        changes = [f"seed={seed}", "tensorboard=False", *trial.changes]
        changes += [f"{key}={self.workdir(other, seed)}" for key, other in trial.earlier.items()]
        changes += [] if steps is None else [f"train_steps={steps}"]
        changes += _ladder_changes(name, budget.arg) if trial.group == "ladder" else []
        return load_config(f"{CONFIGS / trial.config}.py:{budget.arg}", changes)

    def train(self, name: str, seed: int) -> pathlib.Path:
        """Trains a trial and those before it, or goes on, or finds it trained."""
        seeds = self.seeds(name) if self.budget.together else [seed]
        for other in TRIALS[name].earlier.values():
            for each in seeds:
                self.train(other, each)
        folders = [self.workdir(name, each) for each in seeds]
        if not all((folder / "trained.json").exists() for folder in folders):
            self._may_begin(seed)
            print(f"\n== {name}, seed {', '.join(map(str, seeds))} ==", flush=True)
            begin = time.perf_counter()
            experiments = []
            for each, folder in zip(seeds, folders, strict=True):
                config = self.config(name, each)
                prepare_workdir(config, folder)
                experiments.append(Experiment(config, folder))
            if len(experiments) == 1:
                states = [experiments[0].train()]
            else:
                states = experiment.train_together(experiments, folders[0].with_name(f"{folders[0].name}-together"))
            seconds = (time.perf_counter() - begin) / len(experiments)
            for folder, state in zip(folders, states, strict=True):
                found = {"parameters": parameters(state), "seconds": seconds}
                write_whole(epath.Path(folder / "trained.json"), json.dumps(found))
        return self.workdir(name, seed)

    def _may_begin(self, seed: int) -> None:
        """Raises TimeoutError where it is too late, or the seed is another process's."""
        if time.monotonic() > self.deadline or (self.only is not None and seed not in self.only):
            raise TimeoutError

    def seconds(self) -> float:
        """Of training, in all runs of the budget that are finished."""
        folders = (self.workdir(name, seed) for name in TRIALS for seed in self.seeds(name))
        records = (folder / "trained.json" for folder in folders)
        return sum(json.loads(record.read_text())["seconds"] for record in records if record.exists())

    def score(self, name: str, draw: str, seed: int) -> Numbers:
        """The numbers of a trial, drawn from in one way."""
        folder = self.train(name, seed)
        options = TRIALS[name].draws[draw]
        asked = {
            "compositional": {"per_category": self.budget.per_category, "categories": self.budget.categories},
            "frechet": {"examples": self.budget.examples},
        }
        label = hashlib.sha256(json.dumps([options, asked], sort_keys=True).encode()).hexdigest()[:10]
        path = folder / f"score-{label}.json"
        if not path.exists():
            self._may_begin(seed)
            numbers = experiment.evaluate(
                folder, ("compositional", "frechet", "diversity"), generation=options, options=asked
            )
            write_whole(epath.Path(path), json.dumps(numbers))
        return {**json.loads((folder / "trained.json").read_text()), **json.loads(path.read_text())}

    def all(self) -> dict[str, list[Numbers]]:
        """`{row: numbers of each seed}` of all that the budget pays for, before the deadline. A seed that only some
        rows have yet is left out, since rows are compared seed by seed."""
        found: dict[str, dict[int, Numbers]] = {}
        jobs = [
            (seed, name, draw) for name, trial in TRIALS.items() for draw in trial.draws for seed in self.seeds(name)
        ]
        for seed, name, draw in sorted(jobs, key=lambda job: job[0]):  # a whole seed before the next
            with contextlib.suppress(TimeoutError):
                numbers = self.score(name, draw, seed)
                found.setdefault(_row(name, draw), {})[seed] = numbers
        repeated = {_row(name, draw) for name in TRIALS if len(self.seeds(name)) > 1 for draw in TRIALS[name].draws}
        everywhere = [set(found[row]) for row in repeated & set(found)]
        common = set.intersection(*everywhere) if everywhere else set()
        kept = {
            row: [numbers for seed, numbers in seeds.items() if row not in repeated or seed in common]
            for row, seeds in found.items()
        }
        return {row: numbers for row, numbers in kept.items() if numbers}


def _row(name: str, draw: str) -> str:
    return f"{name}, {draw}" if draw else name


def ladder_networks(arg: str) -> dict[str, UNetConfig]:
    """The networks of the design steps that lead to the student's, as the paper leads to its own: attention at the
    lowest resolution, and a first stage that is conditioned."""
    config: Any = load_config(f"{CONFIGS / 'student'}.py:{arg}")
    student: UNetConfig = build(UNetConfig, config.unet)
    depth = tuple(max(1, d) for d in student.down_depth)
    final = dataclasses.replace(student, first_stage="tf", down_depth=depth, self_attention=(False, True))
    return ladder(final)


def _ladder_changes(name: str, arg: str) -> list[str]:
    config = ladder_networks(arg)[name.removeprefix("ladder ")]
    return [f"unet.{field}={value}" for field, value in dataclasses.asdict(config).items()]


def milliseconds(configs: Mapping[str, UNetConfig], rounds: int = 5, batch: int = 16) -> dict[str, float]:
    """Time of a network's forward pass on a batch of 32 px, the fastest of some rounds in which all take turns."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, config in configs.items():
        network, _ = build_network(for_platform(config, "cpu"))
        params = jax.jit(lambda key, network=network: init(network, key))(jax.random.key(0))
        inputs = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), unet.input_spec(config, batch, 8, 8, 20))
        forward = jax.jit(lambda p, *x, network=network: apply(network, p, *x)[0])
        calls[name] = lambda forward=forward, params=params, inputs=inputs: jax.block_until_ready(
            forward(params, *inputs)
        )
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: min(values) for name, values in times.items()}


# --- what is claimed -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two rows in one number: its mean over seeds, and the lower bound that it exceeds with 95%; None for a single
    seed of a number that has no interval of its own."""

    mean: float
    low: float | None


def difference(a: Sequence[Numbers], b: Sequence[Numbers], key: str, factor: float = 1.0) -> Difference:
    """`a - factor b`, seed by seed; a row of a single seed, or one that all seeds share, stands for every seed."""
    count = max(len(a), len(b))
    first, second = (np.resize([numbers[key] for numbers in row], count) for row in (a, b))
    values = first - factor * second
    if count > 1:
        spread = stats.t.ppf(0.95, count - 1) * values.std(ddof=1) / math.sqrt(count)
    else:
        if not all(f"{key}.low" in numbers for numbers in (a[0], b[0])):
            return Difference(float(values.mean()), None)
        widths = [(numbers[f"{key}.high"] - numbers[f"{key}.low"]) / 2 for numbers in (a[0], b[0])]
        spread = stats.norm.ppf(0.95) / stats.norm.ppf(0.975) * math.hypot(widths[0], factor * widths[1])
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
    parts: Callable[[Mapping[str, list[Numbers]]], list[tuple[str, Difference, float]]]

    def judge(self, found: Mapping[str, list[Numbers]], hours: float) -> dict[str, Any]:
        """Its line of the table."""
        if missing := [row for row in self.rows if row not in found]:
            return {"claim": self.claim, "status": f"not run (needs {hours:g} h)", "missing": missing}
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


def _better(a: str, b: str, least: float = 0.0) -> Callable[[Mapping[str, list[Numbers]]], Any]:
    return lambda found: (f"score({a}) - score({b})", difference(found[a], found[b], "score.overall"), least)


def _nearer(a: str, b: str) -> Callable[[Mapping[str, list[Numbers]]], Any]:
    def compare(found: Mapping[str, list[Numbers]]) -> Any:
        return f"Frechet({b}) - Frechet({a})", difference(found[b], found[a], "frechet.distance"), 0.0

    return compare


def _share(a: str, b: str, key: str, factor: float, least: float) -> Callable[[Mapping[str, list[Numbers]]], Any]:
    title = {"score.overall": "score", "diversity.pairwise": "diversity"}[key]
    return lambda found: (f"{title}({a}) - {factor:g} {title}({b})", difference(found[a], found[b], key, factor), least)


def _claim(claim: str, rows: Sequence[str], *parts: Callable[[Mapping[str, list[Numbers]]], Any]) -> Claim:
    return Claim(claim, tuple(rows), lambda found: [part(found) for part in parts])


CLAIMS = (
    _claim(
        "the ladder ends at a network with an equal or better score",
        [f"ladder {step.name}" for step in STEPS],
        _better("ladder G", "ladder A", MARGIN),
    ),
    _claim(
        "distillation helps: output and features > output alone > no teacher",
        ["distilled", "output only", "alone"],
        _better("distilled", "output only"),
        _better("output only", "alone"),
        _nearer("distilled", "alone"),
    ),
    _claim(
        "timestep-aware scaling helps, against a fixed share and against none",
        ["distilled", "fixed share", "no scaling"],
        _better("distilled", "fixed share"),
        _better("distilled", "no scaling"),
    ),
    _claim(
        "the student comes near to its teacher",
        ["distilled", "teacher"],
        _share("distilled", "teacher", "score.overall", 0.95, MARGIN),
    ),
    _claim(
        "four steps are nearly enough, without guidance",
        ["four steps", "distilled, unguided"],
        _share("four steps", "distilled, unguided", "score.overall", 0.95, MARGIN),
        _share("four steps", "distilled, unguided", "diversity.pairwise", 0.8, 0.0),
    ),
    _claim(
        "few-step distillation does it: undistilled, without adversary and without teacher are worse",
        ["four steps", "distilled, 4 steps", "no adversary", "no teacher"],
        _better("four steps", "distilled, 4 steps"),
        _better("four steps", "no adversary"),
        _better("four steps", "no teacher"),
    ),
)


# --- the table -------------------------------------------------------------------------------------------------------


def report(runs: Runs, name: str) -> dict[str, Any]:
    """All that is known, after training what the budget pays for."""
    found = runs.all()
    record: dict[str, Any] = {
        "budget": name,
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "claims": [claim.judge(found, HOURS["night"] if name != "gpu" else HOURS["gpu"]) for claim in CLAIMS],
        "rows": {row: _summary(numbers) for row, numbers in found.items()},
        "updates": {group: steps for group, steps in runs.budget.steps.items() if steps is not None},
        "hours": runs.seconds() / 3600,
    }
    if any(row.startswith("ladder") for row in found):
        times = milliseconds(ladder_networks(runs.budget.arg))
        for step, ms in times.items():
            if f"ladder {step}" in record["rows"]:
                record["rows"][f"ladder {step}"]["milliseconds"] = ms
    return record


KEYS = {
    "parameters": "parameters",
    "score.overall": "score",
    "score.heldout": "held-out",
    "frechet.distance": "Frechet",
    "diversity.pairwise": "diversity",
}


def _summary(per_seed: Sequence[Numbers]) -> dict[str, Any]:
    values = {key: np.array([numbers[key] for numbers in per_seed]) for key in KEYS}
    spread = {f"{key}.spread": float(v.std(ddof=1)) for key, v in values.items() if len(v) > 1 and key != "parameters"}
    return {"seeds": len(per_seed), **{key: float(v.mean()) for key, v in values.items()}, **spread}


def markdown(record: Mapping[str, Any]) -> str:
    """The claims, and the rows that they are judged by."""
    lines = [f"Budget `{record['budget']}`, {record['machine']}, {record['hours']:.1f} h of training.", ""]
    lines += ["| claim | seen | status |", "|---|---|---|"]
    for claim in record["claims"]:
        seen = "; ".join(
            f"{part['compared']} = {part['mean']:+.3f}, "
            + ("of one seed" if part["low"] is None else f"above {part['low']:+.3f}")
            for part in claim.get("parts", [])
        )
        lines.append(f"| {claim['claim']} | {seen} | {claim['status']} |")
    timed = any("milliseconds" in row for row in record["rows"].values())
    titles = [*KEYS.values(), *(["ms"] if timed else []), "seeds"]
    lines += ["", "| run | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, row in record["rows"].items():
        cells = [f"{int(row['parameters']):,}"]
        for key in list(KEYS)[1:]:
            spread = f" ± {row[f'{key}.spread']:.3f}" if f"{key}.spread" in row else ""
            cells.append(f"{row[key]:.3f}{spread}")
        cells += [f"{row['milliseconds']:.1f}" if "milliseconds" in row else ""] if timed else []
        lines.append(f"| {name} | " + " | ".join([*cells, str(row["seeds"])]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains, judges and stores."""
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", choices=tuple(BUDGETS), required=True)
    parser.add_argument("--workdir", default="runs/shapes_claims", help="where the runs are kept")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin nothing after so many hours")
    parser.add_argument("--seed", type=int, action="append", help="make this seed alone; the table has all there are")
    parser.add_argument("--out", default=str(RESULTS / "shapes_claims"), help="of the table: .json and .md")
    options = parser.parse_args()
    root = pathlib.Path(options.workdir).absolute()
    budget = BUDGETS[options.budget]
    if options.seed and budget.together:
        parser.error(f"--seed: the budget {options.budget!r} trains all seeds in one program; leave it out")
    runs = Runs(budget, root, time.monotonic() + 3600 * options.hours, options.seed)
    record = report(runs, options.budget)
    out = pathlib.Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown(record))
    print("\n" + markdown(record))


if __name__ == "__main__":
    main()
