"""The files beside float32: written, judged, and kept or refused."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.export import client, judging
from snapgen_jax.export.compare import VerificationError
from snapgen_jax.export.compat import IncompatibleModelError
from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.judging import Judge, Limits, VariantError
from snapgen_jax.export.levels import Kept, keep_levels
from snapgen_jax.export.mixed import Budget, BudgetError, search
from snapgen_jax.export.precision import (
    QUANTISED,
    Layer,
    Precision,
    QuantisationError,
    quantise,
    weights_of,
    write_variant,
)
from snapgen_jax.export.program import Flow, Program
from snapgen_jax.export.sampler import Arrays, Sampler
from snapgen_jax.training.exports import Stored

CALIBRATION = 8  # examples by which `mixed` is chosen
# What says that one variant is no good; the bundle may well do without it.
FAULTS = (QuantisationError, BudgetError, IncompatibleModelError, VerificationError)
SMALLER = {"float16", "int8", "int4"}
Shapes = Mapping[str, Mapping[str, Any]]
Files = Mapping[str, pathlib.Path]
Storage = Mapping[str, Mapping[str, Stored]]  # {unit: its weights of few levels}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples that are not among the golden ones, with what the float32 files make of them.

    Attributes:
        program, shapes: of a sampler.
        tokenizers: the program's files of that kind.
        inputs: `{name: [N, ...]}`.
        noise: `[N, *noise_shape]` of a flow.
        outputs: `{name: [M, ...]}`, of the first M.
    """

    program: Program
    shapes: Shapes
    tokenizers: Files
    inputs: Arrays
    noise: np.ndarray | None
    outputs: Arrays

    def __len__(self) -> int:
        return len(next(iter(self.outputs.values())))

    def draw(self, units: Mapping[str, Any], count: int) -> Arrays:
        """The outputs of the first examples by other units, `{name: [count, ...]}`."""
        sampler = Sampler(self.program, units, self.shapes)
        made = [
            sampler.run({name: x[i] for name, x in self.inputs.items()}, None if self.noise is None else self.noise[i])
            for i in range(count)
        ]
        return {name: np.stack([one[name] for one in made]) for name in made[0]}


class Variants:
    """The precisions of one export.

    Attributes:
        precisions: those that are wanted and were not refused, float32 first where it is among them.
        refused: {precision: why}.
        described: {precision: what it was judged by}, for the manifest.
        kept: {unit: what of its file of eight bits are weights of few levels}, of the first unit of each file that has
            such weights.
    """

    def __init__(
        self,
        precisions: tuple[Precision, ...],
        by_name: tuple[Precision, ...],
        judge: Judge | None,
        limits: Limits,
        budget: Budget,
    ) -> None:
        self.precisions: tuple[Precision, ...] = precisions
        self.refused: dict[str, str] = {}
        self.described: dict[str, dict[str, Any]] = {}
        self.kept: dict[str, Kept] = {}
        self._by_name, self._judge, self._limits, self._budget = by_name, judge, limits, budget
        self._four: dict[tuple[str, str], tuple[Layer, ...]] = {}  # of (precision, unit)
        self._expected: np.ndarray | None = None

    def others(self) -> list[Precision]:
        """All but float32."""
        return [precision for precision in self.precisions if precision != "f32"]

    def at_once(self) -> list[Precision]:
        """Those that the float32 file alone decides: a large unit writes them in the process that converts it."""
        return [precision for precision in self.others() if precision != "mixed"]

    @contextlib.contextmanager
    def refusing(self, precision: Precision, forget: Callable[[Precision], None]) -> Iterator[None]:
        """Refuses a precision where something inside finds a fault with it: an error where it was asked for by name,
        and otherwise a warning, after which the bundle goes on without it.

        Raises:
            VariantError: it was asked for by name.
        """
        try:
            yield
        except FAULTS as error:
            reason = str(error).removesuffix(" Nothing was written.").removeprefix(f"{precision}: ")
            if precision in self._by_name:
                raise VariantError(f"{precision} is refused: {reason.rstrip('.')}. Nothing was written.") from error
            log.warning("the bundle goes without %s: %s", precision, reason)
            forget(precision)
            self.precisions = tuple(p for p in self.precisions if p != precision)
            self.described.pop(precision, None)
            self.refused[precision] = reason

    def write(self, precision: Precision, sources: Files, targets: Files, examples: Examples, storage: Storage) -> None:
        """Writes the files of a precision that are not there yet, by the float32 ones. Those of eight bits keep the
        levels of weights that were trained to take few.

        Raises:
            QuantisationError: the quantiser changes no weight of any of them, or refuses one.
            BudgetError: no choice of layers keeps to the budget.
        """
        found = self.described[precision] = {}
        if precision == "mixed":
            count = min(CALIBRATION, len(examples))
            first = _first(sources)

            def draw(files: Files, count: int) -> Arrays:
                loaded: dict[pathlib.Path, Any] = {}
                chosen = {name: files.get(first[name], path) for name, path in sources.items()}
                units = {name: client.litert_unit(path, name, loaded=loaded) for name, path in chosen.items()}
                return examples.draw(units, count)

            expected = {name: array[:count] for name, array in examples.outputs.items()}
            whole, to = ({name: files[name] for name in first.values()} for files in (sources, targets))
            choice = search(whole, to, draw, expected, self._budget)
            self._four |= {(precision, name): tuple(chosen) for name, chosen in choice.four.items()}
            found["search"] = choice.describe()
        for name, source in sources.items():
            if not targets[name].exists():
                write_variant(precision, source, targets[name])
            if precision == "int8" and storage[name] and name == _first(sources)[name]:
                self.kept[name] = keep_levels(source, targets[name], storage[name])
                if missing := self.kept[name].missing:
                    log.warning("%s: %s are rounded to eight bits: %s", name, len(missing), ", ".join(missing))
        if not any(SMALLER & weights_of(describe(target)).keys() for target in targets.values()):
            raise QuantisationError(f"{precision}: the quantiser finds no weight in any unit that it could change")

    def in_floats(self, precision: Precision, sources: Files, folder: pathlib.Path, storage: Storage) -> Files:
        """The files of integer weights as a GPU computes with them: multiplied out, and in floating point."""
        assert precision in QUANTISED
        found = {name: folder / source.name for name, source in sources.items()}
        for name in dict.fromkeys(_first(sources).values()):
            quantise(sources[name], found[name], self._four.get((precision, name), ()), "float")
            if precision == "int8" and storage[name]:
                keep_levels(sources[name], found[name], storage[name])
        return found

    def judge(self, precision: Precision, exact: Sampler, variant: Sampler, examples: Examples) -> None:
        """Holds what a variant draws to what float32 draws.

        Raises:
            VariantError: it draws less well than the limits say; by which measure.
        """
        found = self.described[precision]
        count = min(self._limits.prompts, len(self._judge.prompts)) if self._judge else 0
        if self._judge and count:
            if self._expected is None:
                self._expected = self._pictures(exact, examples, count)
            made = self._pictures(variant, examples, count)
            found |= judging.describe_fidelity(judging.decibels(made, self._expected))
            found["paired"] = judging.paired(self._judge, self._expected, made)
        else:
            made = examples.draw(variant.units, len(examples))
            found |= judging.describe_fidelity(judging.fidelity(made, examples.outputs))
        found["judged_by"] = judging.judged_by(found, self._limits)
        if reason := judging.objection(found, self._limits):
            raise VariantError(f"{precision}: {reason}")

    def numbers(self, precision: Precision) -> dict[str, float]:
        """What a precision was judged by, for the report."""
        found = self.described[precision]
        numbers = {f"export.median_db_{precision}": found["median_db"]}
        if "paired" in found:
            score = found["paired"]
            numbers[f"export.paired.difference_{precision}"] = score["variant"] - score["f32"]
            numbers[f"export.paired.low_{precision}"] = score["low"]
        return numbers

    def _pictures(self, sampler: Sampler, examples: Examples, count: int) -> np.ndarray:
        """What is drawn for the first prompts of the judge, `uint8 [count, H, W, 3]`, each from its own noise."""
        assert self._judge is not None and isinstance(examples.program, Flow)
        flow, prompts = examples.program, self._judge.prompts[:count]
        inputs = client.token_inputs(flow, prompts, lambda name: examples.tokenizers[name])
        made = []
        for i, index in enumerate(self._judge.indices[:count]):
            noise = draw_noise(0, index, flow.noise_shape())
            made.append(sampler.run({name: array[i] for name, array in inputs.items()}, noise)["image"])
        return np.stack(made)


def _first(files: Files) -> dict[str, str]:
    """{unit: the first unit of its file}."""
    names: dict[pathlib.Path, str] = {}
    return {unit: names.setdefault(path, unit) for unit, path in files.items()}
