"""The trainings of a paper in one budget: made in the order that they need, kept, scored, and landed.

A run lies in a folder named after the hash of its config, so that it is never made twice, a stopped one goes on, and
papers that ask for the same training under the same name share it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from benchmarks.claims import landing
from benchmarks.claims.batches import KeptBatches
from benchmarks.claims.landing import Landed
from benchmarks.claims.scores import score
from benchmarks.claims.trials import BASES, BUDGETS, CONFIGS, Draw, Paper
from benchmarks.jobs import Job
from benchmarks.measuring import commit, machine
from snapgen_jax import chain_derive
from snapgen_jax.chain_run import parameters
from snapgen_jax.config import load_config, resolve, to_json
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load
from snapgen_jax.seeds import train_together
from snapgen_jax.training import progress
from snapgen_jax.training.files import write_whole


class Runs:
    """The trained runs of a paper in a budget and their scores, made when they are asked for. Implements `jobs.Work`.

    What is landed is not made again, whether or not its run is here; a run is made where something that is not landed
    yet starts from it.
    """

    def __init__(
        self,
        paper: Paper,
        budget: str,
        root: pathlib.Path,
        out: pathlib.Path,
        *,
        together: bool = False,
        images_at_once: int = 16,
        depthwise: str = "auto",
        only: Sequence[int] | None = None,
    ):
        """`root` keeps the runs, `out` the landed files. `together`: all seeds of a trial are trained as one program,
        for a machine that one of them leaves idle. `images_at_once`: that a program draws to be scored. `depthwise`:
        form of that convolution. `only`: the seeds that are made; all by default."""
        self.paper, self.name, self.budget, self.root = paper, budget, BUDGETS[budget], root
        self.landed = out / paper.name / budget
        self.together, self.images_at_once, self.depthwise, self.only = together, images_at_once, depthwise, only
        self._configs: dict[tuple[str, int], Any] = {}
        self._streams: dict[tuple[str, int], str] = {}

    # --- what there is to do ---

    def seeds(self, name: str) -> list[int]:
        """Those of a trial that are made; none where the budget leaves it out."""
        shared = self.paper.trials[name].shared
        every = self.paper.seeds(name, self.name)
        return [seed for seed in every if shared or self.only is None or seed in self.only]

    @functools.cached_property
    def wanted(self) -> dict[str, list[int]]:
        """The seeds of each trial that are not landed yet, or that such a one starts from; as it was at first."""
        found = {
            name: {s for s in self.seeds(name) if trial.draws and not self._is_landed(name, s)}
            for name, trial in self.paper.trials.items()
        }
        for measure in self._measures():
            if not self._is_landed(measure, 0):
                for needed in self.paper.measures[measure].needs:
                    found[needed] |= set(self.seeds(needed))
        for name in reversed(list(self.paper.trials)):
            for other in self.paper.trials[name].earlier.values():
                found[other] |= {0} if self.paper.trials[other].shared and found[name] else found[name]
        return {name: sorted(seeds) for name, seeds in found.items() if seeds}

    def jobs(self) -> list[Job]:
        """All, each after those that it needs: a whole seed before the next, trials of a single seed last."""
        last = [Job("measure", name, (0,)) for name in self._measures()]
        if self.together:
            trials = [
                Job(what, name, tuple(seeds)) for name, seeds in self.wanted.items() for what in self._whats(name)
            ]
            before = [need for job in trials for need in self.needs(job) if need.what == "draw"]
            first = [need for job in before for need in self.needs(job)]
            return list(dict.fromkeys([*first, *before, *trials, *last]))
        most = max((len(self.seeds(name)) for name in self.wanted), default=1)
        groups = [(name, seed) for name, seeds in self.wanted.items() for seed in seeds]
        groups.sort(key=lambda group: most if self._is_single(group[0], most) else group[1])
        return [*(Job(what, name, (seed,)) for name, seed in groups for what in self._whats(name)), *last]

    def _is_single(self, name: str, most: int) -> bool:
        """Whether a trial has fewer seeds than others, and none of those starts from it."""
        return not self.paper.trials[name].shared and len(self.seeds(name)) < most

    def _whats(self, name: str) -> tuple[str, ...]:
        return ("train", "score") if self.paper.trials[name].draws else ("train",)

    def _measures(self) -> list[str]:
        return [name for name, measure in self.paper.measures.items() if self.name in measure.budgets]

    def needs(self, job: Job) -> list[Job]:
        """The jobs that must be done before."""
        if job.what == "score":
            return [dataclasses.replace(job, what="train")]
        if job.what == "measure":
            return [
                Job("train", name, (seed,)) for name in self.paper.measures[job.name].needs for seed in self.seeds(name)
            ]
        trial = self.paper.trials[job.name]
        of_inputs = job.what == "draw"  # of the earlier runs only those whose tokenizer the batches have
        names = dict.fromkeys(
            n for key, n in trial.earlier.items() if not of_inputs or key.startswith(("inputs.", "base"))
        )
        draws = [] if of_inputs or not self._has_kept_batches(job.name) else self._draw_jobs(job)

        def seeds(other: str) -> tuple[int, ...]:
            if self.paper.trials[other].shared:
                return (0,)
            return tuple(self.wanted.get(other, self.seeds(other))) if self.together else job.seeds

        return [*draws, *(Job("train", name, seeds(name)) for name in names)]

    def _has_kept_batches(self, name: str) -> bool:
        return self.together and not self.paper.trials[name].shared

    def _draw_jobs(self, job: Job) -> list[Job]:
        return [Job("draw", self._alike(job.name, seed)[0], (seed,)) for seed in job.seeds]

    def done(self, job: Job) -> bool:
        """Whether all that it makes is there."""
        made = {
            "draw": lambda seed: self._kept_batches(job.name, seed).folder.exists(),
            "train": lambda seed: self._training(job.name, seed) is not None,
            "score": lambda seed: self._is_landed(job.name, seed),
            "measure": lambda seed: self._is_landed(job.name, seed),
        }[job.what]
        return all(made(seed) for seed in job.seeds)

    def do(self, job: Job) -> None:
        """Makes it, or what of it is not there."""
        {"draw": self._draw, "train": self._train, "score": self._score, "measure": self._measure}[job.what](job)

    # --- where it is, and what it is of ---

    def workdir(self, name: str, seed: int = 0) -> pathlib.Path:
        """Where a trial is, named after its config, which names the trials before it; or a stored base."""
        if base := self.paper.trials[name].base(self.name):
            return base
        return self.root / f"{name.replace(' ', '_')}-{_hash(self._config_text(name, seed))}"

    def config(self, name: str, seed: int = 0) -> Any:
        """The completed config of a trial that trains."""
        seed = 0 if self.paper.trials[name].shared else seed
        if (name, seed) not in self._configs:
            self._configs[name, seed] = self._read_config(name, seed)
        return self._configs[name, seed]

    def _read_config(self, name: str, seed: int) -> Any:
        trial, arg = self.paper.trials[name], self.budget.arg
        updates = trial.effort[self.name].updates
        changes = [f"seed={seed}", "tensorboard=False"]
        changes += trial.changes(arg) if callable(trial.changes) else trial.changes
        changes += [f"{key}={path}" for key, path in self._earlier(name, seed).items()]
        changes += [] if updates is None else [f"train_steps={updates}"]
        form = trial.args.get(arg, arg)
        config = load_config(f"{CONFIGS / trial.config}.py" + (f":{form}" if form else ""), changes)
        fix_platform(config, dtype=trial.dtype, depthwise=self.depthwise)
        return config

    def _output(self, name: str, seed: int) -> pathlib.Path:
        """What later trials are given of a trial: its workdir, or what is derived there."""
        derivation = self.paper.trials[name].derivation
        return self.workdir(name, seed) / (derivation.output if derivation else "")

    def _earlier(self, name: str, seed: int) -> dict[str, pathlib.Path]:
        """What a trial is given of those that it starts from, by its keys."""
        return {key: self._output(other, seed) for key, other in self.paper.trials[name].earlier.items()}

    def _config_text(self, name: str, seed: int) -> str:
        if derivation := self.paper.trials[name].derivation:
            stages = {key: str(path) for key, path in self._earlier(name, seed).items()}
            text = json.dumps([derivation.function, derivation.options(self.budget.arg), stages], sort_keys=True)
        else:
            text = to_json(self.config(name, seed))
        return text.replace(str(self.root), "").replace(str(BASES), "bases")

    def _setting(self, name: str, seed: int) -> str:
        """Fingerprint of all that a trial's numbers depend on."""
        if name in self.paper.measures:
            function = self.paper.measures[name].function
            return _hash(json.dumps([self.budget.arg, f"{function.__module__}.{function.__qualname__}"]))
        draws = {draw: _plain(how.of(self.budget.arg, seed)) for draw, how in self.paper.trials[name].draws.items()}
        return _hash(json.dumps([self._config_text(name, seed), draws, self._asked()], sort_keys=True))

    def _asked(self) -> dict[str, Any]:
        budget = dataclasses.asdict(self.budget)
        return {key: budget[key] for key in ("per_category", "images", "examples", "categories")}

    def _is_landed(self, name: str, seed: int) -> bool:
        path = self.landed / landing.file_name(name, seed)
        return path.exists() and Landed.read(path).setting == self._setting(name, seed)

    def _stream_text(self, name: str, seed: int) -> str:
        """What a trial's batches depend on."""
        if (name, seed) not in self._streams:
            config = self.config(name, seed)
            inputs = json.loads(to_json(config.inputs))
            inputs = {key: value for key, value in inputs.items() if not key.endswith("_dropout")}  # drawn in the step
            text = json.dumps([to_json(config.data), inputs, config.batch_size, config.seed])
            self._streams[name, seed] = text.replace(str(self.root), "")
        return self._streams[name, seed]

    def _alike(self, name: str, seed: int) -> list[str]:
        """The trials of a seed that learn from the same batches."""
        made = [n for n, t in self.paper.trials.items() if not t.shared and seed in self.paper.seeds(n, self.name)]
        return [n for n in made if self._stream_text(n, seed) == self._stream_text(name, seed)]

    def _kept_batches(self, name: str, seed: int) -> KeptBatches:
        config = self.config(name, seed)
        label = _hash(json.dumps([self._stream_text(name, seed), self._longest(name, seed)]))
        size = "x".join(map(str, config.inputs.image_sizes[0]))
        return KeptBatches(self.root / f"batches-{seed}-{label}", size)

    def _longest(self, name: str, seed: int) -> int:
        """Updates of the longest of the trials that learn from the same."""
        return max(self.config(other, seed).train_steps for other in self._alike(name, seed))

    def _training(self, name: str, seed: int) -> dict[str, Any] | None:
        """Parameters and seconds of a finished training; None of one that is not."""
        folder = self.workdir(name, seed)
        if self.paper.trials[name].base(self.name):
            return {**json.loads((folder / "base.json").read_text()), "seconds": 0.0}
        file = folder / "trained.json"
        return json.loads(file.read_text()) if file.exists() else None

    def log_file(self, job: Job) -> pathlib.Path:
        """What a job says that is made in a process of its own."""
        return self.root / "logs" / f"{self.paper.name}_{str(job).replace(' ', '_')}.log"

    # --- making it ---

    def _draw(self, job: Job) -> None:
        for seed in job.seeds:
            kept = self._kept_batches(job.name, seed)
            experiment = Experiment(resolve(self.config(job.name, seed)), self.workdir(job.name, seed))
            stream = experiment.data.batches(0)
            kept.draw(stream, self._longest(job.name, seed))
            progress.close(stream)

    def _derive(self, name: str) -> None:
        trial, folder = self.paper.trials[name], self.workdir(name)
        assert trial.derivation is not None
        begin = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        function = chain_derive.function_of(name, trial.derivation.function)
        stages = {key: epath.Path(path) for key, path in self._earlier(name, 0).items()}
        function(stages, epath.Path(folder), trial.derivation.options(self.budget.arg))
        found = {"parameters": 0, "seconds": time.perf_counter() - begin}
        write_whole(epath.Path(folder / "trained.json"), json.dumps(found))

    def _train(self, job: Job) -> None:
        if self.paper.trials[job.name].derivation:
            self._derive(job.name)
            return
        missing = [seed for seed in job.seeds if not self.done(dataclasses.replace(job, seeds=(seed,)))]
        folders = [self.workdir(job.name, seed) for seed in missing]
        begin = time.perf_counter()
        experiments = []
        for seed, folder in zip(missing, folders, strict=True):
            config = self.config(job.name, seed)
            experiments.append(Experiment(resolve(config), folder))
            if self._has_kept_batches(job.name):
                experiments[-1].data = self._kept_batches(job.name, seed)
        if not experiments:
            return
        if len(experiments) == 1:
            states = [experiments[0].train()]
        else:
            together = "-".join([folders[0].name, *map(str, missing), "together"])
            states = train_together(experiments, folders[0].with_name(together))
        seconds = (time.perf_counter() - begin) / len(experiments)
        for folder, state in zip(folders, states, strict=True):
            found = {"parameters": parameters(state), "seconds": seconds}
            write_whole(epath.Path(folder / "trained.json"), json.dumps(found))

    def _score(self, job: Job) -> None:
        trial, generator = self.paper.trials[job.name], None
        for seed in job.seeds:
            if self._is_landed(job.name, seed):
                continue
            folder = self.workdir(job.name, seed)
            if trial.base(self.name):  # scoring leaves pictures beside what it scores
                folder = shutil.copytree(folder, self.root / folder.name, dirs_exist_ok=True)
            trained = self._training(job.name, seed) or {}
            loaded = load(folder)
            generator = loaded if generator is None else generator.with_weights(loaded.params, loaded.frozen)
            rows = {}
            for draw, row in trial.rows(job.name).items():
                how = trial.draws[draw].of(self.budget.arg, seed)
                label = _hash(json.dumps([_plain(how), self._asked()], sort_keys=True))
                path = epath.Path(folder / f"score-{label}.json")  # a stopped process goes on after it
                if not path.exists():
                    numbers = score(folder, how, self.budget, self.images_at_once, generator, self.paper.metrics)
                    write_whole(path, json.dumps(numbers))
                rows[row] = {"parameters": trained["parameters"], **json.loads(path.read_text())}
            minutes, updates = trained["seconds"] / 60, self.config(job.name, seed).train_steps
            self._land(job.name, seed, rows, minutes=round(minutes, 2), updates=updates)

    def _measure(self, job: Job) -> None:
        measure = self.paper.measures[job.name]
        workdirs = {name: self.workdir(name, seed) for name in measure.needs for seed in self.seeds(name)[:1]}
        self._land(job.name, 0, measure.function(self.budget.arg, workdirs))

    def _land(self, name: str, seed: int, rows: Any, **more: Any) -> None:
        Landed(name, seed, rows, self._setting(name, seed), machine(), commit(), **more).write(self.landed)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _plain(draw: Draw) -> list[Any]:
    """A draw as JSON, with options that are no function."""
    options: Any = draw.options
    plain = [dict(options), list(draw.evaluators), draw.wrap.__qualname__ if draw.wrap else None]
    more = [dict(draw.reference), list(draw.categories), draw.images]
    return [*plain, *filter(None, more)]


def fix_platform(config: Any, **chosen: str) -> None:
    """Sets `dtype` or `depthwise` of every network of a config that leaves it to the platform."""
    for value in config.values():
        if hasattr(value, "values"):
            for field, choice in chosen.items():
                if value.get(field) == "auto":
                    value[field] = choice
            fix_platform(value, **chosen)
