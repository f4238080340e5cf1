"""What a paper's claims need: trainings, measurements, and how much of them a budget pays for. Plain data."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import claims
from benchmarks.claims.claim import METRICS, Claim, Metric
from snapgen_jax.data.prompts import CATEGORIES

CONFIGS = pathlib.Path("configs/shapes")
BASES = pathlib.Path(__file__).parents[1] / "bases"
IMAGES = ("compositional", "frechet", "diversity")
SINGLE = ("single_object", "colours")


@dataclasses.dataclass(frozen=True)
class Effort:
    """What a budget gives a training: updates, None as its config says; seeds; and where it was measured what an update
    takes, in seconds of two cores, None for the budget's own guess."""

    updates: int | None = None
    seeds: int = 1
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Draw:
    """One way to draw from a trained run and to score it.

    Attributes:
        options: of the generator; or a function of the configs' argument and of the seed that gives them.
        evaluators: by name.
        wrap: makes of the generator the one that is scored, such as `scores.PermutedCaptions`.
        reference: options of the full way of sampling, for the evaluator `deviation`.
        categories: of the score; those of the budget by default.
        images: for each prompt; those of the budget by default.
    """

    options: Mapping[str, Any] | Callable[[str, int], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    evaluators: tuple[str, ...] = IMAGES
    wrap: Callable[[Any], Any] | None = None
    reference: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    categories: tuple[str, ...] = ()
    images: int = 0

    def of(self, arg: str, seed: int) -> Draw:
        """As a seed is drawn from: with options that are no function."""
        return dataclasses.replace(self, options=self.options(arg, seed)) if callable(self.options) else self


@dataclasses.dataclass(frozen=True)
class Derivation:
    """What a stage of a chain derives, in place of a training.

    Attributes:
        function: its name, "module.path:function".
        options: of it, a function of the configs' argument.
        output: what of its workdir later trials are given.
    """

    function: str
    options: Callable[[str], Mapping[str, Any]]
    output: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        config: file under `configs/shapes`, without its ending.
        effort: {budget: updates and seeds}; a budget that is not here leaves it out.
        changes: overrides of the config; or a function of the budget's argument of configs that gives them.
        earlier: {config key: name of the trial whose workdir is filled in}.
        draws: {name: how it is drawn from}. The row of "" has the trial's name, another is "TRIAL, NAME".
        dtype: in which its networks compute: float32 on every machine, since claims are of methods and not of number
            formats, unless the claim is of one.
        shared: all seeds of the others start from this one training.
        args: {argument of configs: what this config calls it}, where that is another; "" for none.
        stored: the run of `benchmarks/bases` that is taken in place of the training in budgets of the form "quick".
        derivation: what is made in place of a training; `earlier` then has the names by which it knows other trials.
    """

    config: str
    effort: Mapping[str, Effort]
    changes: Sequence[str] | Callable[[str], Sequence[str]] = ()
    earlier: Mapping[str, str] = dataclasses.field(default_factory=dict)
    draws: Mapping[str, Draw] = dataclasses.field(default_factory=lambda: {"": Draw()})
    dtype: str = "float32"
    shared: bool = False
    args: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stored: str = ""
    derivation: Derivation | None = None

    def base(self, budget: str) -> pathlib.Path | None:
        """The stored run that a budget takes in place of the training."""
        return BASES / self.stored if self.stored and BUDGETS[budget].arg == "quick" else None

    def updates(self, budget: str) -> int:
        """Of the training in a budget; 0 where it is stored, or its config alone knows."""
        return 0 if self.base(budget) else self.effort[budget].updates or 0

    def seconds(self, budget: str) -> float:
        """Of one seed's training in a budget, on two cores; updates that its config alone knows are not counted."""
        each = self.effort[budget].seconds
        return self.updates(budget) * (BUDGETS[budget].seconds if each is None else each)

    def rows(self, name: str) -> dict[str, str]:
        """{draw: row}."""
        return {draw: f"{name}, {draw}" if draw else name for draw in self.draws}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measurement that trains nothing, made once and valid for every seed of its rows.

    Attributes:
        function: of the budget's argument of configs and {trial: workdir}; gives {row: {key: number}}.
        rows: that it gives numbers of.
        metrics: keys of those numbers.
        budgets: that make it.
        needs: trials whose workdirs it is given.
    """

    function: Callable[[str, Mapping[str, pathlib.Path]], Mapping[str, Mapping[str, float]]]
    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    budgets: tuple[str, ...]
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Budget:
    """How well rows are measured.

    Attributes:
        arg: of the configs: their forms on patches of pixels; "quick" has single objects only.
        per_category: prompts of each category of the score.
        images: drawn for each prompt, whose mean is the prompt's score.
        examples: images of the Frechet distance, and twice those of the diversity.
        seconds: of an update, to say what is still needed: of two busy CPU cores, or of a GPU.
        categories: of the score.
    """

    arg: str
    per_category: int
    images: int
    examples: int
    seconds: float
    categories: tuple[str, ...] = CATEGORIES


CPU_UPDATE, GPU_UPDATE = 0.4, 0.01  # of a student: 94,000 updates took 10.4 hours beside other work; all seeds at once
BUDGETS = {  # from the shortest; "short" is 2.5 hours of two cores for a paper's rows
    "ci": Budget("runlocal", 2, 1, 8, CPU_UPDATE),
    "short": Budget("quick", 64, 8, 512, CPU_UPDATE, SINGLE),
    "night": Budget("quick", 64, 8, 512, CPU_UPDATE, SINGLE),
    "gpu": Budget("quick", 64, 8, 512, GPU_UPDATE, SINGLE),
    "world": Budget("patches", 64, 3, 512, GPU_UPDATE),
}
RECORDED = tuple(name for name in BUDGETS if name != "ci")  # whose numbers mean something


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper's module as one value.

    Raises:
        ValueError: a claim needs a row or a metric that nothing gives, or rows that no single budget makes; or a trial
            starts from one that does not stand before it.
    """

    name: str
    claims: Sequence[Claim]
    trials: Mapping[str, Trial]
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=lambda: METRICS)

    def __post_init__(self) -> None:
        rows, before = self.makers(), set()
        for claim in self.claims:
            for part in claim.parts:
                for row in (part.a, part.b):
                    if row not in rows:
                        raise ValueError(
                            f"{self.name}: {claim.claim!r} needs the row {row!r}; add a trial that gives it"
                        )
                if part.metric not in self.metrics:
                    raise ValueError(f"{self.name}: {claim.claim!r} compares {part.metric!r}; add it to METRICS")
            if not self.budgets_of(claim):
                raise ValueError(f"{self.name}: no budget of {', '.join(RECORDED)} makes all rows of {claim.claim!r}")
        for name, trial in self.trials.items():
            if late := set(trial.earlier.values()) - before:
                raise ValueError(f"{self.name}: {name!r} starts from {sorted(late)}; list these before it in TRIALS")
            before.add(name)

    def makers(self) -> dict[str, list[str]]:
        """{row: names of the trials and measurements that give its numbers}."""
        found: dict[str, list[str]] = {}
        for name, trial in self.trials.items():
            for row in trial.rows(name).values():
                found.setdefault(row, []).append(name)
        for name, measure in self.measures.items():
            for row in measure.rows:
                found.setdefault(row, []).append(name)
        return found

    def trials_of(self, claim: Claim) -> list[str]:
        """The trials that a claim's rows need, in the order in which they are made."""
        makers = self.makers()
        return self.needed_by([name for row in claim.rows for name in makers[row] if name in self.trials])

    def budgets_of(self, claim: Claim) -> list[str]:
        """The recorded budgets that make all that a claim needs, from the shortest."""
        used = {(row, part.metric) for part in claim.parts for row in (part.a, part.b)}
        measures = [m for m in self.measures.values() if used & {(row, key) for row in m.rows for key in m.metrics}]
        efforts = [self.trials[name].effort for name in self.trials_of(claim)]
        return [b for b in RECORDED if all(b in e for e in efforts) and all(b in m.budgets for m in measures)]

    def needed_by(self, names: Sequence[str]) -> list[str]:
        """The trials named, and those that they start from, in the order in which they are made."""
        wanted = set(names)
        for name in reversed(list(self.trials)):
            wanted |= set(self.trials[name].earlier.values()) if name in wanted else set()
        return [name for name in self.trials if name in wanted]

    def seeds(self, name: str, budget: str) -> list[int]:
        """Those of a trial in a budget; none where the budget leaves it out."""
        trial = self.trials[name]
        if budget not in trial.effort:
            return []
        return list(range(1 if trial.shared else trial.effort[budget].seeds))


def paper(name: str) -> Paper:
    """The paper of a module of this package.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in paper_names():
        raise ValueError(f"no paper {name!r}; there are {', '.join(paper_names())}")
    values = vars(importlib.import_module(f"{claims.__name__}.{name}"))
    metrics = {**METRICS, **values.get("METRICS", {})}
    return Paper(name, values["CLAIMS"], values["TRIALS"], values.get("MEASURES", {}), metrics)


def paper_names() -> list[str]:
    """The modules of this package that have claims."""
    names = [module.name for module in pkgutil.iter_modules(claims.__path__) if not module.name.startswith("_")]
    return [name for name in names if "CLAIMS" in vars(importlib.import_module(f"{claims.__name__}.{name}"))]
