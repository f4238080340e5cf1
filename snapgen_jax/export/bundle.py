"""A trained recipe to a bundle: a folder that a phone's client needs nothing else to load, check and run.

    manifest.json     what is here: units, signatures, shapes, ranges, operators, errors, versions, SHA-256 of each file
    <unit>_<precision>.tflite, of f32, f16, int8 and mixed
    program.json      which calls make an example, as data; its schema stands at the top of program.py
    tokenizer.json    of the `tokenizers` library, where the program takes prompts; tokenizers/<encoder>.json where
                      several encoders read them
    golden/           .npy arrays, whose names `golden.run` explains, golden.json: prompts, tolerances, and
                      conformance.json: small cases for a client in another language
    client.py and program.py, sampler.py, noise.py, runtime.py, older.py   what runs it: numpy, ai-edge-litert alone
    verify.py         checks all of this, with the same two libraries
    SPEC.md, spec.json   what a client must do, for one who writes it in another language
    README.md         for the person who loads it

A bundle is written beside its place under another name, verified there, and moved: it is whole or it is not there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from snapgen_jax.diffusion import noise as noise_module
from snapgen_jax.export import (
    client,
    compare,
    conformance,
    golden,
    memory,
    older,
    program,
    runtime,
    sampler,
    spec,
    verify,
)
from snapgen_jax.export.compat import Requirements, check, flex_operators
from snapgen_jax.export.convert import Backend, to_tflite, to_tflite_apart
from snapgen_jax.export.flatbuffer import Description
from snapgen_jax.export.frames import framed
from snapgen_jax.export.judging import LIMITS, Judge, Limits
from snapgen_jax.export.manifest import About, Ranges, describe_unit, fingerprints, versions, write_json
from snapgen_jax.export.mixed import BUDGET, Budget
from snapgen_jax.export.precision import DEFAULT, QUANTISED, Precision, checked
from snapgen_jax.export.program import Flow, Program
from snapgen_jax.export.readme import readme
from snapgen_jax.export.sampler import Arrays, Sampler
from snapgen_jax.export.storage import describe_storage
from snapgen_jax.export.unit_files import GPUCheck, UnitFiles
from snapgen_jax.export.variants import Examples, Variants
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs

ACTIVATION_EXAMPLES = 24
ACTIVATION_SECONDS = 30.0
OWN_PROCESS = 50_000_000  # a unit of more parameters is converted in a process of its own: it takes 35 bytes for each
Reference = Callable[[Mapping[str, np.ndarray], np.ndarray | None], Mapping[str, np.ndarray]]
"""`({input: [N, ...]}, noise [N, *noise_shape] or None) -> {output: [N, ...]}`"""


class Exportable(Protocol):
    """What the exporter asks of a recipe; see `training.recipe.Recipe`."""

    @property
    def options(self) -> Any: ...

    def exports(self) -> ExportPlan: ...

    def weights(self, params: Any, frozen: Any) -> dict[str, Any]: ...

    def generate(self, *arguments: Any, **options: Any) -> dict[str, jax.Array]: ...


log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BundleReport:
    """Where a bundle is, and what was measured while it was made.

    Attributes:
        folder: the bundle.
        numbers: for each unit `export.<unit>.rel_l2_<precision>` (the worst case), `.bytes_<precision>`,
            `.max_activation`, `.rel_l2_gpu` and `.rel_l2_gpu_f16` (where a GPU accelerator runs), `.convert_seconds`
            (the first unit's includes loading the converter), `.convert_peak_bytes` (of a large unit, whose conversion
            is a process of its own) and `.peak_bytes_<precision>` (of a process that runs it); over all units
            `export.bytes_<precision>`, `export.peak_bytes_in_turn_<precision>` and `_together_`, and
            `export.flex_ops`; of whole trajectories
            `export.trajectory.rel_l2_<precision>` (the last latent); of what each precision draws beside float32
            `export.median_db_<precision>`, and `export.paired.difference_<precision>` and `.low_<precision>` where the
            run has an exact score (see `judging.paired`); of each output `export.<output>.max_grey_f32` and,
            against the recipe's own generator, `.max_grey_to_generator`. The last two are `.rel_l2_f32` and
            `.rel_l2_to_generator` for an output that is no picture.
        operators: {unit: {operator: nodes}} of the float32 files.
        refused: {precision: why}, of those that are written as a rule and were not good enough.
    """

    folder: pathlib.Path
    numbers: dict[str, float]
    operators: dict[str, dict[str, int]]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)


def export_bundle(
    recipe: Exportable,
    params: Any,
    frozen: Any,
    tokenizers: str | pathlib.Path | Mapping[str, pathlib.Path] | None,
    out_dir: str | pathlib.Path,
    *,
    precisions: Sequence[Precision] | None = None,
    backend: Backend = "jax2tf",
    golden_inputs: GoldenInputs | None = None,
    reference: Reference | None = None,
    gpu_check: GPUCheck = "check",
    judge: Judge | None = None,
    limits: Limits = LIMITS,
    budget: Budget = BUDGET,
    about: About | None = None,
) -> BundleReport:
    """Exports a recipe's generator.

    Args:
        recipe: whose `exports()` names the units and the program. Build it for the platform "cpu" where its own
            generator is to be the reference.
        params: `{player: parameters}`, the averaged ones as a rule.
        frozen: `{role: parameters}` of the recipe's frozen networks, those that generation needs.
        tokenizers: the tokenizer.json that the recipe was trained with, or `{name in the bundle: file}` of several;
            None for a program without prompts.
        out_dir: the bundle's folder. One that holds a bundle is replaced; any other that is not empty is refused.
        precisions: weights to write, of "f32", "f16", "int8" and "mixed": all of them, or an error. By default the
            first three, without those that are not good enough.
        backend: see `to_tflite`.
        golden_inputs: what the golden examples begin with; the plan's own where none is given.
        reference: an independent sampler over the same weights; `generator_of(recipe, params, frozen)` is the recipe's
            own. Its pictures may differ by one grey level from those of the client's sampler.
        gpu_check: "check" runs every file on LiteRT's GPU accelerator, where a Vulkan driver is found, and refuses a
            file that is wrong there, or whose activations float16 would not hold; "skip" exports it nevertheless.
        judge: an exact score of the pictures, by which all but float32 are judged; without one, by decibels.
        limits: what they must hold.
        budget: of "mixed".
        about: the model's name, licence and provenance, for the manifest.

    Raises:
        FileExistsError: `out_dir` holds something else.
        ValueError: the plan or its program does not fit together; names what is wrong.
        IncompatibleModelError: a file holds what a phone does not run.
        VerificationError: a file does not compute what JAX computes.
        VariantError: a precision that was given is not good enough. All leave `out_dir` as it was.
    """
    out_dir = pathlib.Path(out_dir).absolute()
    wanted = Variants(
        DEFAULT if precisions is None else checked(precisions), precisions is not None, judge, limits, budget
    )
    check_place(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizers, str | pathlib.Path):
        tokenizers = {"tokenizer.json": pathlib.Path(tokenizers)}
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.partial.", dir=out_dir.parent) as scratch:
        weights = recipe.weights(params, frozen)
        folder = pathlib.Path(scratch) / "bundle"
        plan, files = recipe.exports(), tokenizers or {}
        plan = dataclasses.replace(plan, program=framed(plan.program, files))
        export = _Export(plan, weights, folder, wanted, backend, gpu_check, about or About())
        report = export.run(files, golden_inputs, reference)
        if out_dir.exists():
            out_dir.rename(pathlib.Path(scratch) / "before")
        report.folder.rename(out_dir)
    return dataclasses.replace(report, folder=out_dir)


def check_place(out_dir: str | pathlib.Path) -> None:
    """Raises `FileExistsError` where a folder holds something that a bundle may not replace."""
    out_dir = pathlib.Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f"{out_dir} is a file; give --out a folder for the bundle")
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "manifest.json").is_file():
        raise FileExistsError(f"{out_dir} holds files and is no bundle; name another folder, or empty this one")


def generator_of(recipe: Exportable, params: Any, frozen: Any) -> Reference:
    """The recipe's own generator as a reference: `generate` with the noise given among its conditions."""

    def run(inputs: Mapping[str, np.ndarray], noise: np.ndarray | None) -> dict[str, np.ndarray]:
        cpu = compare.cpu_device()
        conditions = {**inputs, **({} if noise is None else {"noise": noise})}
        with jax.default_device(cpu):
            keys = jax.random.split(jax.random.key(0), len(next(iter(conditions.values()))))
            made = _generate(recipe, jax.device_put(params, cpu), jax.device_put(frozen, cpu), conditions, keys)
            return {name: np.asarray(array) for name, array in made.items()}

    return run


def _generate(recipe: Exportable, params: Any, frozen: Any, conditions: Any, keys: jax.Array) -> dict[str, jax.Array]:
    def generate(params: Any, frozen: Any, conditions: Any, keys: jax.Array) -> dict[str, jax.Array]:
        return recipe.generate(params, frozen, conditions, keys, recipe.options)

    return jax.jit(generate)(params, frozen, conditions, keys)


def _parsed(plan: ExportPlan) -> Program:
    """The program of a plan, held against its units. Raises `ValueError` that names what does not fit."""
    try:
        parsed = program.parse(json.loads(json.dumps(plan.program, allow_nan=False)))
    except TypeError as error:
        raise ValueError(f"the plan's program is no plain JSON: {error}") from error
    names = [unit.name for unit in plan.units]
    if bad := [name for name in [*names, *parsed.inputs, *parsed.outputs] if not re.fullmatch(r"[a-z0-9_]+", name)]:
        raise ValueError(f"{bad[0]!r} is no name of a file: lower-case letters, digits and underscores are")
    if set(names) != parsed.units() or len(set(names)) < len(names):
        raise ValueError(f"the program calls the units {sorted(parsed.units())}; the plan has {names}")
    if both := set(names) & set(parsed.outputs):
        raise ValueError(f"{both.pop()!r} is both a unit and an output; rename one")
    return parsed


class _Export:
    """One export, step by step; the state that its steps share."""

    def __init__(
        self,
        plan: ExportPlan,
        weights: Mapping[str, Any],
        folder: pathlib.Path,
        variants: Variants,
        backend: Backend,
        gpu_check: GPUCheck,
        about: About,
    ) -> None:
        self.plan, self.program = plan, _parsed(plan)
        self.units = {unit.name: unit for unit in plan.units}
        self.weights = {name: unit.select(weights) for name, unit in self.units.items()}
        storage = {name: describe_storage(unit, weights) for name, unit in self.units.items()}
        self.shapes = {
            name: {tensor: tuple(spec.shape) for tensor, spec in unit.inputs.items()}
            for name, unit in self.units.items()
        }
        self.folder, self.variants = folder, variants
        self.backend: Backend = backend
        self.gpu: GPUCheck = gpu_check
        self.about = about
        self.files = UnitFiles(folder, gpu_check, storage)
        self.numbers, self.described = self.files.numbers, self.files.described

    def run(
        self, tokenizers: Mapping[str, pathlib.Path], inputs: GoldenInputs | None, reference: Reference | None
    ) -> BundleReport:
        inputs = self.plan.golden if inputs is None else inputs
        begin, noise = golden.begin(self.program, inputs, tokenizers)
        self.folder.mkdir()
        for name in {entry.file for entry in self.program.tokenizers}:
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(tokenizers[name], self.folder / name)
        for module in (noise_module, program, sampler, runtime, older, client, verify):
            shutil.copyfile(str(module.__file__), self.folder / pathlib.Path(str(module.__file__)).name)
        write_json(self.folder / "program.json", self.plan.program)
        spec.write(self.folder)

        jax_units = {name: compare.jax_unit(unit, self.weights[name]) for name, unit in self.units.items()}
        ranges, calls = Ranges(), golden.Calls()
        watched = {name: calls.watch(name, ranges.watch(name, unit)) for name, unit in jax_units.items()}
        log.info("golden examples in JAX")
        arrays = golden.run(Sampler(self.program, watched, self.shapes), begin, noise, golden.RECORDED)

        descriptions = {name: self._convert(unit) for name, unit in self.units.items()}
        for name in self.units:
            free = golden.takes_any_time(self.program, name)
            exact = Sampler(self.program, jax_units, self.shapes)
            cases = golden.denoiser_cases(exact, arrays) if free else calls.cases(name)
            self.files.begin(name, describe_unit(name, descriptions[name], ranges), jax_units[name], cases)
            self.files.compare(name, "f32")
        examples = self._activations(inputs, tokenizers)
        tolerances = {"f32": self._trajectory("f32", arrays)}
        if reference is not None:
            self._outputs(reference, arrays)
        for precision in self.variants.others():
            with self.variants.refusing(precision, self.files.forget):
                self._variant(precision, examples)
                tolerances[precision] = self._trajectory(precision, arrays)
                self.numbers |= self.variants.numbers(precision)
        if "f32" not in self.variants.precisions:
            self.files.forget("f32")
            del tolerances["f32"]

        for name, array in {**arrays, **golden.self_test(calls, jax_units)}.items():
            path = self.folder / "golden" / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array, allow_pickle=False)
        count = len(next(iter(arrays.values())))
        facts = {"prompts": list(inputs.prompts), "seed": inputs.seed, "examples": count, "tolerances": tolerances}
        facts["self_test"] = {precision: self._self_test(precision) for precision in self.variants.precisions}
        facts["gpu_factor"] = {p: compare.GPU_LIMITS[p] / compare.LIMITS[p] for p in self.variants.precisions}
        write_json(self.folder / "golden" / "golden.json", facts)
        cases = conformance.conformance(self.program, lambda name: self.folder / name)
        conformance.write(self.folder / "golden" / "conformance.json", cases)
        self._finish()
        operators = {name: description.histogram for name, description in descriptions.items()}
        return BundleReport(self.folder, self.numbers, operators, self.variants.refused)

    def _convert(self, unit: ExportUnit) -> Description:
        """Writes a unit's float32 file and holds it to what phones take; of a large unit, its variants as well."""
        f32 = self.files.path(unit.name, "f32")
        log.info("converting %s by %s", unit.name, self.backend)
        start, weights = time.perf_counter(), self.weights[unit.name]
        conversion = unit.function, weights, unit.inputs, unit.name, f32, self.backend
        if sum(np.size(leaf) for leaf in jax.tree.leaves(weights)) > OWN_PROCESS:
            others: dict[Any, Any] = {
                precision: self.files.path(unit.name, precision) for precision in self.variants.at_once()
            }
            peak = to_tflite_apart(*conversion, variants=others)
            self.numbers[f"export.{unit.name}.convert_peak_bytes"] = peak
        else:
            to_tflite(*conversion)
        self.numbers[f"export.{unit.name}.convert_seconds"] = time.perf_counter() - start
        description = check(f32, Requirements(gpu=self._for_gpu(unit)))
        flex = flex_operators(description)
        self.numbers["export.flex_ops"] = self.numbers.get("export.flex_ops", 0) + flex
        return description

    def _variant(self, precision: Precision, examples: Examples) -> None:
        """Writes the files of a precision, and holds them to what phones take, to JAX, and to what float32 draws."""
        sources, targets = ({name: self.files.path(name, p) for name in self.units} for p in ("f32", precision))
        self.variants.write(precision, sources, targets, examples)
        for name, unit in self.units.items():
            check(targets[name], Requirements(gpu=self._for_gpu(unit)))
            self.files.compare(name, precision)
        self.variants.judge(precision, self._litert("f32"), self._litert(precision), examples)

    def _for_gpu(self, unit: ExportUnit) -> bool:
        """Whether a phone's GPU runs a unit. An embedding table is read by a gather, which none does: an encoder of
        token ids is for the CPU."""
        encoders = self.program.encoders() if isinstance(self.program, Flow) else set()
        ids = any(np.issubdtype(spec.dtype, np.integer) for spec in unit.inputs.values())
        return not (unit.name in encoders and ids)

    def _activations(self, inputs: GoldenInputs, tokenizers: Mapping[str, pathlib.Path]) -> Examples:
        """How large numbers grow over other prompts and noise, and all steps; as many as fit into the time. Returns
        those examples, with what float32 makes of them."""
        until = time.monotonic() + ACTIVATION_SECONDS
        units = {name: client.litert_unit(self.files.path(name, "f32"), name) for name in self.units}
        watched = {name: self.files.activations[name].watch(unit, until) for name, unit in units.items()}
        varied = Sampler(self.program, watched, self.shapes)
        given, noise = golden.begin(self.program, golden.others(inputs, ACTIVATION_EXAMPLES), tokenizers)
        made: list[Arrays] = []
        for i in range(ACTIVATION_EXAMPLES):
            if time.monotonic() > until:
                log.info("largest activations are over %d of %d examples", i, ACTIVATION_EXAMPLES)
                break
            made.append(
                varied.run({name: array[i] for name, array in given.items()}, None if noise is None else noise[i])
            )
        for name, seen in self.files.activations.items():
            self.numbers[f"export.{name}.max_activation"] = seen.value
            self.described[name]["max_activation"] = {"value": seen.value, "tensor": seen.tensor, "calls": seen.calls}
            if self.gpu == "check" and self._for_gpu(self.units[name]):
                seen.hold(name)
            elif not seen.value <= compare.FLOAT16_HEADROOM:
                log.warning(
                    "%s: |%s| reaches %.3g, and float16 ends at 65504: on a GPU, ask for float32 arithmetic",
                    name, seen.tensor, seen.value,
                )  # fmt: skip
        outputs = {name: np.stack([one[name] for one in made]) for name in made[0]}
        return Examples(self.program, self.shapes, tokenizers, given, noise, outputs)

    def _trajectory(self, precision: Precision, arrays: Arrays) -> dict[str, Any]:
        """The tolerances of the golden arrays in a precision, and how close LiteRT comes here."""
        inputs, noise = golden.inputs_of(arrays), arrays.get("noise")
        found = golden.run(self._litert(precision), inputs, noise)
        if noise is not None:
            last = max(map(verify.relative_l2, found["latents"][:, -1], arrays["latents"][:, -1]))
            self.numbers[f"export.trajectory.rel_l2_{precision}"] = last
        if precision == "f32":
            for name in self.program.outputs:
                kind, error = self._difference(name, found[f"outputs/{name}"], arrays)
                self.numbers[f"export.{name}.{kind}_f32"] = error
        if precision not in QUANTISED:
            return golden.tolerances(self._litert("f32"), arrays, precision)
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as scratch:
            floats = self.variants.in_floats(
                precision, {name: self.files.path(name, "f32") for name in self.units}, pathlib.Path(scratch)
            )
            units = {name: client.litert_unit(path, name) for name, path in floats.items()}
            other = golden.run(Sampler(self.program, units, self.shapes), inputs, noise)
        return golden.measured_tolerances(self.program, arrays, (found, other))

    def _litert(self, precision: Precision) -> Sampler:
        units = {name: client.litert_unit(self.files.path(name, precision), name) for name in self.units}
        return Sampler(self.program, units, self.shapes)

    def _difference(self, name: str, made: np.ndarray, arrays: Arrays) -> tuple[str, float]:
        """How far an output is from the golden one: ("max_grey", levels) or ("rel_l2", error)."""
        expected = arrays[f"outputs/{name}"]
        if self.program.outputs[name].dtype == "uint8":
            return "max_grey", int(verify.grey_levels(made, expected).max())
        return "rel_l2", max(map(verify.relative_l2, made, expected))

    def _outputs(self, reference: Reference, arrays: Arrays) -> None:
        """The golden outputs against those of an independent sampler."""
        made = reference(golden.inputs_of(arrays), arrays.get("noise"))
        if missing := [name for name in self.program.outputs if name not in made]:
            raise compare.VerificationError(
                f"the recipe's own generator gives {', '.join(made)}, and the program also {', '.join(missing)}"
            )
        limits = {"max_grey": 1, "rel_l2": golden.SAFETY * compare.LIMITS["f32"]}
        for name in self.program.outputs:
            kind, worst = self._difference(name, np.asarray(made[name]), arrays)
            self.numbers[f"export.{name}.{kind}_to_generator"] = worst
            if not worst <= limits[kind]:
                measure = "grey levels" if kind == "max_grey" else "in relative L2"
                raise compare.VerificationError(
                    f"{name}: the client's sampler and the recipe's own differ by {worst:g} {measure} for the same "
                    f"inputs and noise; {limits[kind]:g} is accepted. Does program.json say what the recipe does? "
                    "Nothing was written."
                )

    def _self_test(self, precision: Precision) -> float:
        """How far a recorded call may be off on an accelerator for a client to use it: relative L2."""
        worst = max(self.numbers[f"export.{name}.rel_l2_{precision}"] for name in self.units)
        return 2 * worst + golden.SELF_TEST

    def _memory(self) -> dict[str, Any]:
        """The peak of a process that runs the files, for the manifest: unit by unit, in turn, and together."""
        files = {
            precision: {
                name: {
                    "path": str(self.files.path(name, precision)),
                    "signature": name,
                    "inputs": {n: (spec.shape, str(spec.dtype)) for n, spec in unit.inputs.items()},
                }
                for name, unit in self.units.items()
            }
            for precision in self.variants.precisions
        }
        try:
            found = memory.measure(files)
        except memory.MeasurementError as error:
            raise compare.VerificationError(
                f"the files do not run by themselves: {error}. Nothing was written."
            ) from error
        for precision in self.variants.precisions:
            for name, peak in found[precision].pop("units").items():
                self.described[name].setdefault("peak_bytes", {})[precision] = peak
                self.numbers[f"export.{name}.peak_bytes_{precision}"] = peak
            for name, held in found[precision].pop("loaded").items():
                self.described[name].setdefault("load_bytes", {})[precision] = held
            for way, peak in found[precision].items():
                self.numbers[f"export.peak_bytes_{way}_{precision}"] = peak
        return found

    def _finish(self) -> None:
        """Writes the manifest last, and reads the whole bundle as its user will."""
        held = self._memory()
        for unit in self.described.values():
            unit["accelerators_verified"] = {
                "cpu": list(self.variants.precisions),
                "gpu": [p for p in self.variants.precisions if unit["gpu"]["checked"] and p in unit["gpu"]["rel_l2"]],
            }
        manifest = {
            "schema": client.MANIFEST_SCHEMA,
            **self.about.fields(),
            "precisions": list(self.variants.precisions),
            "variants": self.variants.described,
            "refused": self.variants.refused,
            "backend": self.backend,
            "units": self.described,
            "memory": held,
            "measured": self.numbers,
            "versions": versions(),
        }
        (self.folder / "README.md").write_text(readme(manifest, self.program), "utf-8")
        manifest["files"] = fingerprints(self.folder)
        write_json(self.folder / "manifest.json", manifest)
        failed = [f"{c.name}: {c.finding}" for c in verify.checks(self.folder) if not c.passed]
        if failed:
            raise compare.VerificationError("the bundle fails its own verify.py:\n  " + "\n  ".join(failed))
