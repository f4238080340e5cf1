"""What `shapes_claims` trains: every trial, how much of it a budget pays for, and the runs that are kept.

A run lies in a folder named after the hash of its config, so that it is never made twice and a stopped one goes on.
Networks that all seeds share (CLIP, the teacher) are trained once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from benchmarks.jobs import Job
from benchmarks.measuring import fastest
from snapgen_jax import experiment
from snapgen_jax.chain import parameters
from snapgen_jax.config import build, load_config, to_json
from snapgen_jax.data.prompts import CATEGORIES
from snapgen_jax.experiment import Experiment, prepare_workdir
from snapgen_jax.generation import load
from snapgen_jax.networks.counting import STEPS, ladder, macs
from snapgen_jax.networks.module import apply, for_platform, init
from snapgen_jax.networks.module import build as build_network
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.training import progress
from snapgen_jax.training.files import write_whole
from snapgen_jax.training.loop import PlainBatch

CONFIGS = pathlib.Path("configs/shapes")
UNGUIDED = {"guidance": 1.0}
LATENT = (8, 8)  # of the shapes world
Numbers = dict[str, Any]  # floats by name, and as NAME.each those of single prompts
Rows = dict[str, dict[str, Numbers]]  # by row, then by seed


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        config: file under `configs/shapes`, without its ending.
        changes: overrides of it.
        earlier: {config key: name of the trial whose workdir is filled in}.
        group: whose number of updates and of seeds it has.
        draws: {row: options of the generator} to be scored.
        dtype: in which its networks compute. All but one compute in float32 on every machine, since the claims are of
            methods and not of number formats.
    """

    config: str
    changes: tuple[str, ...] = ()
    earlier: Mapping[str, str] = dataclasses.field(default_factory=dict)
    group: str = "student"
    draws: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})
    dtype: str = "float32"


TEXT = {"text_workdir": "clip"}
TAUGHT = {**TEXT, "teacher.workdir": "teacher"}
FROM_DISTILLED = {**TAUGHT, "init_from": "distilled", "trunk_workdir": "distilled"}
BOTH = {"": {}, "unguided": {**UNGUIDED, "steps": 28}}  # what the paper sets beside four steps
TRIALS = {  # in the order in which they are made
    "clip": Trial("clip", group="clip", draws={}),
    "teacher": Trial("teacher", earlier=TEXT, group="teacher"),
    "alone": Trial("student", earlier=TEXT, draws=BOTH),
    "distilled": Trial("student_distilled", earlier=TAUGHT, draws={**BOTH, "4 steps": {**UNGUIDED, "steps": 4}}),
    "output only": Trial("student_distilled", ("feature_weight=0.0",), TAUGHT, draws=BOTH),
    "fixed share": Trial("student_distilled", ("scaling.alpha=constant",), TAUGHT),
    "no scaling": Trial("student_distilled", ("scaling.alpha=none",), TAUGHT),
    "four steps": Trial("student_few_step", earlier=FROM_DISTILLED, group="few-step"),
    "no adversary": Trial("student_few_step", ("adversarial_weight=0.0",), FROM_DISTILLED, "few-step"),
    "no teacher": Trial("student_few_step", ("output_weight=0.0",), FROM_DISTILLED, "few-step"),
    "eight steps": Trial("student_few_step", ("sampling.steps=8",), FROM_DISTILLED, "eight steps"),
    **{f"ladder {step.name}": Trial("student", earlier=TEXT, group="ladder") for step in STEPS},
    "with ratio": Trial("student_distilled", ("scaling.ratio=running",), TAUGHT, "ratio"),
    "alone in bfloat16": Trial("student", earlier=TEXT, group="bfloat16", dtype="bfloat16"),
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
        hours: that it takes, as planned: of two CPU cores, or of a GPU.
    """

    arg: str
    steps: Mapping[str, int | None]
    seeds: Mapping[str, int]
    per_category: int
    examples: int
    hours: float
    categories: tuple[str, ...] = CATEGORIES


SINGLE = ("single_object", "colours")
NIGHT: dict[str, int | None] = {
    "clip": 1_000,
    "teacher": 12_000,
    "student": 4_000,
    "few-step": 1_000,
    "ladder": 4_000,
    "eight steps": 1_000,
    "ratio": 4_000,
}
BUDGETS = {
    "ci": Budget("runlocal", dict.fromkeys(NIGHT), {}, 2, 8, 0.1),
    "hour": Budget(
        "quick", {"clip": 1_000, "teacher": 12_000, "student": 2_000, "few-step": 600}, {}, 64, 256, 1.5, SINGLE
    ),
    "night": Budget("quick", NIGHT, {"student": 3, "few-step": 3}, 64, 512, 10.0, SINGLE),
    "gpu": Budget(
        "quick",
        {**NIGHT, "bfloat16": 4_000},
        {"student": 3, "few-step": 3, "ladder": 3, "bfloat16": 3},
        64,
        512,
        0.5,
        SINGLE,
    ),
    "world": Budget(
        "patches",
        {"clip": 12_000, "teacher": 60_000, "student": 34_400, "few-step": 12_000, "ladder": 34_400},
        {"student": 3, "few-step": 3, "ladder": 3},
        64,
        512,
        3.0,
    ),
}


@dataclasses.dataclass(frozen=True)
class KeptBatches:
    """The first batches of a stream, drawn once for the several runs that learn from them. Implements `loop.Batches`.

    Attributes:
        folder: where they are.
        bucket: that they are of.
    """

    folder: pathlib.Path
    bucket: str

    def draw(self, stream: Iterator[Any], count: int) -> None:
        """Keeps the first batches of a stream."""
        batches = list(itertools.islice(stream, count))
        arrays = {name: np.stack([batch.arrays[name] for batch in batches]) for name in batches[0].arrays}
        arrays["source_index"] = np.stack([batch.source_index for batch in batches])
        half = self.folder.with_name(f"{self.folder.name}.tmp")
        half.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(half / f"{name}.npy", array)
        half.rename(self.folder)

    def batches(self, position: int) -> Iterator[PlainBatch]:
        """From batch `position` on."""
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in self.folder.glob("*.npy")}
        index = arrays.pop("source_index")
        for i in range(position, len(index)):
            yield PlainBatch(self.bucket, {name: np.array(array[i]) for name, array in arrays.items()}, index[i])


class Runs:
    """The trained runs of a budget and their scores, made when they are asked for, and kept. Implements `jobs.Work`."""

    def __init__(
        self,
        budget: Budget,
        root: pathlib.Path,
        *,
        together: bool = False,
        images_at_once: int = 16,
        depthwise: str = "auto",
        only: Sequence[int] | None = None,
    ):
        """`together`: all seeds of a trial are trained as one program, for a machine that one of them leaves idle.
        `images_at_once`: that a program draws to be scored. `depthwise`: form of that convolution. `only`: the seeds
        that are made; all by default."""
        self.budget, self.root, self.together, self.images_at_once = budget, root, together, images_at_once
        self.depthwise, self.only = depthwise, only
        self._configs: dict[tuple[str, int], Any] = {}

    # --- what there is to do ---

    def seeds(self, name: str) -> list[int]:
        """Those of a trial that are made; none where the budget leaves it out."""
        group = TRIALS[name].group
        if group not in self.budget.steps:
            return []
        count = 1 if name in SHARED else self.budget.seeds.get(group, 1)
        return [seed for seed in range(count) if name in SHARED or self.only is None or seed in self.only]

    def jobs(self) -> list[Job]:
        """All, each after those that it needs: a whole seed before the next, trials of a single seed last."""
        names = [name for name in TRIALS if self.seeds(name)]
        most = max(self.budget.seeds.values(), default=1)
        if not self.together:
            groups = [(name, seed) for name in names for seed in self.seeds(name)]
            once = {
                name for name in names if name not in SHARED and self.budget.seeds.get(TRIALS[name].group, 1) < most
            }
            groups.sort(key=lambda group: most if group[0] in once else group[1])
            return [Job(what, name, (seed,)) for name, seed in groups for what in ("train", "score")]
        first = [Job("train", "clip", (0,)), *(Job("draw", "alone", (seed,)) for seed in self.seeds("alone"))]
        rest = [Job(what, name, tuple(self.seeds(name))) for name in names for what in ("train", "score")]
        return list(dict.fromkeys([*first, *rest]))

    def needs(self, job: Job) -> list[Job]:
        """The jobs that must be done before."""
        if job.what == "score":
            return [dataclasses.replace(job, what="train")]
        if job.what == "draw":
            return [Job("train", "clip", (0,))]  # whose tokenizer it is
        drawn = [Job("draw", "alone", (seed,)) for seed in job.seeds] if self._has_kept_batches(job.name) else []

        def seeds(other: str) -> tuple[int, ...]:
            return tuple(self.seeds(other)) if self.together or other in SHARED else job.seeds

        return [*drawn, *(Job("train", name, seeds(name)) for name in dict.fromkeys(TRIALS[job.name].earlier.values()))]

    def _has_kept_batches(self, name: str) -> bool:
        return self.together and name not in SHARED

    def done(self, job: Job) -> bool:
        """Whether all that it makes is there."""
        made = {
            "draw": lambda seed: [self._kept_batches(seed).folder],
            "train": lambda seed: [self.workdir(job.name, seed) / "trained.json"],
            "score": lambda seed: [self._score_file(job.name, draw, seed) for draw in TRIALS[job.name].draws],
        }[job.what]
        return all(path.exists() for seed in job.seeds for path in made(seed))

    def do(self, job: Job) -> None:
        """Makes it, or what of it is not there."""
        {"draw": self._draw, "train": self._train, "score": self._score}[job.what](job)

    # --- where it is, and what it is of ---

    def workdir(self, name: str, seed: int = 0) -> pathlib.Path:
        """Where a trial is, named after its config, which names the trials before it."""
        text = to_json(self.config(name, seed)).replace(str(self.root), "")
        return self.root / f"{name.replace(' ', '_')}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def config(self, name: str, seed: int = 0) -> Any:
        """The config of a trial."""
        seed = 0 if name in SHARED else seed
        if (name, seed) not in self._configs:
            self._configs[name, seed] = self._read_config(name, seed)
        return self._configs[name, seed]

    def _read_config(self, name: str, seed: int) -> Any:
        trial, budget = TRIALS[name], self.budget
        steps = budget.steps[trial.group]
        changes = [f"seed={seed}", "tensorboard=False", *trial.changes]
        changes += [f"{key}={self.workdir(other, seed)}" for key, other in trial.earlier.items()]
        changes += [] if steps is None else [f"train_steps={steps}"]
        changes += _ladder_changes(name, budget.arg) if trial.group == "ladder" else []
        config = load_config(f"{CONFIGS / trial.config}.py:{budget.arg}", changes)
        fix_platform(config, dtype=trial.dtype, depthwise=self.depthwise)
        return config

    def _score_file(self, name: str, draw: str, seed: int) -> pathlib.Path:
        text = json.dumps([TRIALS[name].draws[draw], self._asked()], sort_keys=True)
        return self.workdir(name, seed) / f"score-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def _asked(self) -> dict[str, dict[str, Any]]:
        return {
            "compositional": {"per_category": self.budget.per_category, "categories": self.budget.categories},
            "frechet": {"examples": self.budget.examples},
        }

    def _kept_batches(self, seed: int) -> KeptBatches:
        """Of the trials of a seed, which all learn from the same."""
        config = self.config("alone", seed)
        text = json.dumps([to_json(config.data), config.batch_size, config.text_workdir, self._longest()])
        label = hashlib.sha256(text.replace(str(self.root), "").encode()).hexdigest()[:10]
        size = "x".join(map(str, config.image_sizes[0]))
        return KeptBatches(self.root / f"batches-{seed}-{label}", size)

    def _longest(self) -> int:
        """Updates of the longest of these trials."""
        names = [name for name in TRIALS if self.seeds(name) and name not in SHARED]
        return max(self.config(name).train_steps for name in names)

    def log_file(self, job: Job) -> pathlib.Path:
        """What a job says that is made in a process of its own."""
        return self.root / "logs" / f"{str(job).replace(' ', '_')}.log"

    # --- making it ---

    def _draw(self, job: Job) -> None:
        for seed in job.seeds:
            kept = self._kept_batches(seed)
            stream = Experiment(self.config(job.name, seed), self.workdir(job.name, seed)).data.batches(0)
            kept.draw(stream, self._longest())
            progress.close(stream)

    def _train(self, job: Job) -> None:
        missing = [seed for seed in job.seeds if not self.done(dataclasses.replace(job, seeds=(seed,)))]
        folders = [self.workdir(job.name, seed) for seed in missing]
        begin = time.perf_counter()
        experiments = []
        for seed, folder in zip(missing, folders, strict=True):
            config = self.config(job.name, seed)
            prepare_workdir(config, folder)
            experiments.append(Experiment(config, folder))
            if self._has_kept_batches(job.name):
                experiments[-1].data = self._kept_batches(seed)
        if not experiments:
            return
        if len(experiments) == 1:
            states = [experiments[0].train()]
        else:
            together = "-".join([folders[0].name, *map(str, missing), "together"])
            states = experiment.train_together(experiments, folders[0].with_name(together))
        seconds = (time.perf_counter() - begin) / len(experiments)
        for folder, state in zip(folders, states, strict=True):
            found = {"parameters": parameters(state), "seconds": seconds}
            write_whole(epath.Path(folder / "trained.json"), json.dumps(found))

    def _score(self, job: Job) -> None:
        generator = None
        for seed in job.seeds:
            folder = self.workdir(job.name, seed)
            loaded = load(folder)
            generator = loaded if generator is None else generator.with_weights(loaded.params, loaded.frozen)
            for draw, options in TRIALS[job.name].draws.items():
                path = self._score_file(job.name, draw, seed)
                if path.exists():
                    continue
                found = experiment.measure(
                    folder,
                    ("compositional", "frechet", "diversity"),
                    generation={**options, "batch_size": self.images_at_once},
                    options=self._asked(),
                    generator=generator,
                )
                each = {f"{name}.each": values.tolist() for name, values in found.values.items()}
                write_whole(epath.Path(path), json.dumps({**found.numbers, **each}))

    # --- what is known ---

    def numbers(self, name: str, draw: str, seed: int) -> Numbers | None:
        """Of a trial that is trained, and scored in one way; None where it is not."""
        path = self._score_file(name, draw, seed)
        if not path.exists():
            return None
        return {**json.loads((path.parent / "trained.json").read_text()), **json.loads(path.read_text())}

    def rows(self) -> Rows:
        """Of all that is there. What all seeds share stands in each of them."""
        found: Rows = {}
        for name, trial in TRIALS.items():
            for draw in trial.draws:
                kept = {str(seed): numbers for seed in self.seeds(name) if (numbers := self.numbers(name, draw, seed))}
                found |= {f"{name}, {draw}" if draw else name: kept} if kept else {}
        everywhere = sorted({seed for row, seeds in found.items() if row not in SHARED for seed in seeds})
        for name in SHARED & set(found):
            found[name] = dict.fromkeys(everywhere or found[name], next(iter(found[name].values())))
        return found

    def seconds(self) -> float:
        """Of training, in all runs of the budget that are finished."""
        folders = (self.workdir(name, seed) for name in TRIALS for seed in self.seeds(name))
        records = (folder / "trained.json" for folder in folders)
        return sum(json.loads(record.read_text())["seconds"] for record in records if record.exists())


def fix_platform(config: Any, **chosen: str) -> None:
    """Sets `dtype` or `depthwise` of every network of a config that leaves it to the platform."""
    for value in config.values():
        if hasattr(value, "values"):
            for field, choice in chosen.items():
                if value.get(field) == "auto":
                    value[field] = choice
            fix_platform(value, **chosen)


# --- the ladder ------------------------------------------------------------------------------------------------------


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


def multiply_adds(config: UNetConfig) -> float:
    """Of one call for one image of the shapes world, in millions."""
    return macs(config, config.input_spec(1, *LATENT, 20)) / 1e6


def milliseconds(configs: Mapping[str, UNetConfig], rounds: int = 5, batch: int = 16) -> dict[str, float]:
    """Time on the CPU of a network's forward pass on a batch of 32 px, the fastest of some rounds in which all take
    turns."""
    calls: dict[str, Callable[[], Any]] = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for name, config in configs.items():
            network, _ = build_network(for_platform(config, "cpu"))
            params = jax.jit(lambda key, network=network: init(network, key))(jax.random.key(0))
            inputs = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), config.input_spec(batch, *LATENT, 20))
            forward = jax.jit(lambda p, *x, network=network: apply(network, p, *x)[0])
            calls[name] = functools.partial(forward, params, *inputs)
        return {name: 1e3 * seconds for name, seconds in fastest(calls, rounds).items()}
