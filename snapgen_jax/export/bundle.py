"""A trained recipe to a bundle: a folder that a phone's client needs nothing else to load, check and run.

    manifest.json     what is here: units, signatures, shapes, ranges, operators, errors, versions, SHA-256 of each file
    <unit>_<precision>.tflite, of f32, f16, int8 and mixed; a file of several units has a signature for each.
                      <unit>_int8.packed is in place of a file of eight bits whose weights of few levels are shipped
                      packed, and PACKING.md says how to read it
    program.json      which calls make an example, as data; its schema stands at the top of program.py;
                      programs/<H>x<W>.json and golden/<H>x<W>/ are those of further image sizes
    tokenizer.json    of the `tokenizers` library, where the program takes prompts; tokenizers/<encoder>.json where
                      several encoders read them
    golden/           .npy arrays, whose names `golden.run` explains, golden.json: prompts, tolerances, and
                      conformance.json: small cases for a client in another language
    client.py and program.py, sampler.py, noise.py, runtime.py, older.py, digits.py, unpacking.py   what runs it:
                      numpy, ai-edge-litert alone
    verify.py         checks all of this, with the same two libraries
    SPEC.md, spec.json   what a client must do, for one who writes it in another language
    README.md         for the person who loads it

A bundle is written beside its place under another name, verified there, and moved: it is whole or it is not there.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from snapgen_jax.diffusion import noise as noise_module
from snapgen_jax.export import (
    client,
    compare,
    conformance,
    digits,
    golden,
    memory,
    older,
    packed,
    program,
    runtime,
    sampler,
    spec,
    unpacking,
    verify,
)
from snapgen_jax.export.compat import Requirements, check, flex_operators
from snapgen_jax.export.convert import Backend, to_tflite, to_tflite_apart
from snapgen_jax.export.flatbuffer import Description
from snapgen_jax.export.frames import framed
from snapgen_jax.export.judging import LIMITS, Judge, Limits
from snapgen_jax.export.manifest import About, fingerprints, versions, write_json
from snapgen_jax.export.mixed import BUDGET, Budget
from snapgen_jax.export.precision import DEFAULT, Precision, checked
from snapgen_jax.export.readme import readme
from snapgen_jax.export.sampler import Arrays, Sampler
from snapgen_jax.export.sized import Reference, Sized
from snapgen_jax.export.unit_files import GPUCheck
from snapgen_jax.export.variants import Examples, Variants
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs

ACTIVATION_EXAMPLES = 24
ACTIVATION_SECONDS = 30.0
OWN_PROCESS = 50_000_000  # a unit of more parameters is converted in a process of its own: it takes 35 bytes for each


class Exportable(Protocol):
    """What the exporter asks of a recipe; see `training.recipe.Recipe`."""

    @property
    def options(self) -> Any: ...

    def exports(self) -> ExportPlan: ...

    def weights(self, params: Any, frozen: Any) -> dict[str, Any]: ...

    def generate(self, *arguments: Any, **options: Any) -> dict[str, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The image sizes of a bundle beside its own; none by default.

    Attributes:
        own: the name of the bundle's own, "64x64": height and width.
        others: {name: the recipe at that size}, over the same weights.
    """

    own: str = ""
    others: Mapping[str, Exportable] = dataclasses.field(default_factory=dict)


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
            `export.flex_ops`; of packed units `export.<unit>.bytes_packed`, and over all units `export.bytes_packed`,
            what is shipped in place of `bytes_int8`; of whole trajectories
            `export.trajectory.rel_l2_<precision>` (the last latent); of what each precision draws beside float32
            `export.median_db_<precision>`, and `export.paired.difference_<precision>` and `.low_<precision>` where the
            run has an exact score (see `judging.paired`); of each output `export.<output>.max_grey_f32` and,
            against the recipe's own generator, `.max_grey_to_generator`. The last two are `.rel_l2_f32` and
            `.rel_l2_to_generator` for an output that is no picture. Those of a further image size begin with
            `export.<H>x<W>.`.
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
    sizes: Sizes = Sizes(),
    form: packed.Form = "plain",
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
        sizes: further image sizes.
        form: "packed" puts a packed file in the place of each file of eight bits whose unit has weights of few levels
            (`ExportUnit.storage`); a client unpacks it when it starts for the first time. It asks for "int8".

    Raises:
        FileExistsError: `out_dir` holds something else.
        ValueError: the plan or its program does not fit together, or nothing can be packed; names what is wrong.
        IncompatibleModelError: a file holds what a phone does not run.
        VerificationError: a file does not compute what JAX computes.
        VariantError: a precision that was given is not good enough. All leave `out_dir` as it was.
    """
    out_dir = pathlib.Path(out_dir).absolute()
    chosen = DEFAULT if precisions is None else checked(precisions)
    if form == "packed" and "int8" not in chosen:
        raise ValueError(f"files of int8 are what is packed, and the precisions are {', '.join(chosen)}; add int8")
    by_name: tuple[Precision, ...] = ("int8",) if form == "packed" else ()
    wanted = Variants(chosen, by_name if precisions is None else chosen, judge, limits, budget)
    check_place(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizers, str | pathlib.Path):
        tokenizers = {"tokenizer.json": pathlib.Path(tokenizers)}
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.partial.", dir=out_dir.parent) as scratch:
        folder, files = pathlib.Path(scratch) / "bundle", tokenizers or {}

        def at(recipe: Exportable, *size: Any) -> Sized:
            plan, weights = recipe.exports(), recipe.weights(params, frozen)
            plan = dataclasses.replace(plan, program=framed(plan.program, files))
            return Sized(plan, weights, folder, gpu_check, *size)

        own = at(recipe)
        others = {name: at(other, name, own.units) for name, other in sizes.others.items()}
        if form == "packed" and not any(own.storage.values()):
            raise ValueError(packed.NOTHING_PACKED)
        references = [] if reference is None else [reference]
        references += [generator_of(other, params, frozen) for other in sizes.others.values() if references]
        export = _Export(own, others, wanted, backend, gpu_check, about or About(), form)
        report = export.run(files, golden_inputs, references, sizes.own)
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


class _Export:
    """One export, step by step; the state that its steps share."""

    def __init__(
        self,
        own: Sized,
        others: Mapping[str, Sized],
        variants: Variants,
        backend: Backend,
        gpu_check: GPUCheck,
        about: About,
        form: packed.Form,
    ) -> None:
        self.own, self.others, self.sizes = own, others, [own, *others.values()]
        self.program, self.folder, self.variants = own.program, own.folder, variants
        self.backend: Backend = backend
        self.gpu: GPUCheck = gpu_check
        self.about, self.form = about, form
        self.units, self.files = own.units, own.files
        self.numbers, self.described = own.numbers, own.described

    def run(
        self,
        tokenizers: Mapping[str, pathlib.Path],
        inputs: GoldenInputs | None,
        references: Sequence[Reference],
        own_size: str,
    ) -> BundleReport:
        log.info("golden examples in JAX")
        for size in self.sizes:
            size.draw_golden(inputs, tokenizers)
        self.folder.mkdir()
        for name in {entry.file for entry in self.program.tokenizers}:
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(tokenizers[name], self.folder / name)
        for module in (noise_module, program, sampler, runtime, older, digits, unpacking, client, verify):
            shutil.copyfile(str(module.__file__), self.folder / pathlib.Path(str(module.__file__)).name)
        for size in self.sizes:
            size.write_program()
        spec.write(self.folder)

        descriptions = self._convert_all()
        for size in self.sizes:
            size.compare_f32(descriptions)
        examples = self._activations(tokenizers)
        for size in self.sizes:
            size.note_activations(log)
            size.measure("f32", self.variants)
        for size, reference in zip(self.sizes, references, strict=bool(references)):
            size.hold_outputs(reference)
        for precision in self.variants.others():
            with self.variants.refusing(precision, self._forget):
                self._variant(precision, examples)
                for size in self.sizes:
                    size.measure(precision, self.variants)
                self.numbers |= self.variants.numbers(precision)
        if "f32" not in self.variants.precisions:
            self._forget("f32")

        for size in self.sizes:
            size.write_golden(self.variants.precisions)
        cases = conformance.conformance(self.program, lambda name: self.folder / name)
        conformance.write(self.folder / "golden" / "conformance.json", cases)
        self._finish(own_size)
        operators = {name: description.histogram_of(name) for name, description in descriptions.items()}
        return BundleReport(self.folder, self.numbers, operators, self.variants.refused)

    def _forget(self, precision: Precision) -> None:
        for size in self.sizes:
            size.forget(precision)

    def _convert_all(self) -> dict[str, Description]:
        """Writes the float32 files; returns what the file of each unit says about itself."""
        files: dict[str, list[ExportUnit]] = {}
        for unit in self.units.values():
            files.setdefault(unit.stem, []).append(unit)
        found = {stem: self._convert(*units) for stem, units in files.items()}
        return {name: found[unit.stem] for name, unit in self.units.items()}

    def _convert(self, unit: ExportUnit, *beside: ExportUnit) -> Description:
        """Writes the float32 file of a unit, with those beside it, and holds it to what phones take; of a large unit,
        its variants as well."""
        f32 = self.files.path(unit.name, "f32")
        log.info("converting %s by %s", unit.name, self.backend)
        start, weights = time.perf_counter(), self.own.weights[unit.name]
        further = {one.name: (one.function, one.inputs) for one in beside} | {
            signature: (size.units[one.name].function, size.units[one.name].inputs)
            for size in self.others.values()
            for one in (unit, *beside)
            if (signature := size.signatures[one.name]) != one.name
        }
        conversion = unit.function, weights, unit.inputs, unit.name, f32, self.backend
        if sum(np.size(leaf) for leaf in jax.tree.leaves(weights)) > OWN_PROCESS:
            variants: dict[Any, Any] = {
                precision: self.files.path(unit.name, precision) for precision in self.variants.at_once()
            }
            peak = to_tflite_apart(*conversion, variants, further)
            self.numbers[f"export.{unit.name}.convert_peak_bytes"] = peak
        else:
            to_tflite(*conversion, further)
        self.numbers[f"export.{unit.name}.convert_seconds"] = time.perf_counter() - start
        description = check(f32, self._requirements(unit.name))
        flex = flex_operators(description)
        self.numbers["export.flex_ops"] = self.numbers.get("export.flex_ops", 0) + flex
        return description

    def _requirements(self, name: str) -> Requirements:
        return Requirements(gpu=self.own.for_gpu(name), branches=self.units[name].branches)

    def _variant(self, precision: Precision, examples: Examples) -> None:
        """Writes the files of a precision, and holds them to what phones take, to JAX, and to what float32 draws."""
        sources, targets = self.files.paths("f32"), self.files.paths(precision)
        self.variants.write(precision, sources, targets, examples, self.own.storage)
        for name in self.units:
            check(targets[name], self._requirements(name))
            for size in self.sizes:
                size.files.compare(name, precision)
        self.variants.judge(precision, self.own.litert("f32"), self.own.litert(precision), examples)

    def _activations(self, tokenizers: Mapping[str, pathlib.Path]) -> Examples:
        """How large numbers grow over other prompts and noise, and all steps; as many as fit into the time. Returns
        those examples, with what float32 makes of them."""
        until = time.monotonic() + ACTIVATION_SECONDS
        units = self.files.load_all(self.files.paths("f32"))
        watched = {name: self.files.activations[name].watch(unit, until) for name, unit in units.items()}
        varied = Sampler(self.program, watched, self.own.shapes)
        given, noise = golden.begin(self.program, golden.others(self.own.given, ACTIVATION_EXAMPLES), tokenizers)
        made: list[Arrays] = []
        for i in range(ACTIVATION_EXAMPLES):
            if time.monotonic() > until:
                log.info("largest activations are over %d of %d examples", i, ACTIVATION_EXAMPLES)
                break
            made.append(
                varied.run({name: array[i] for name, array in given.items()}, None if noise is None else noise[i])
            )
        outputs = {name: np.stack([one[name] for one in made]) for name in made[0]}
        return Examples(self.program, self.own.shapes, tokenizers, given, noise, outputs)

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

    def _pack(self) -> None:
        """Packs the files of eight bits whose units have weights of few levels."""
        total = self.numbers["export.bytes_int8"]
        for name, kept in self.variants.kept.items():
            plain = self.files.path(name, "int8").name
            file, whole = packed.pack(self.folder, plain, kept, self.own.storage[name])
            size = (self.folder / file).stat().st_size
            for beside, unit in self.described.items():
                if unit["files"]["int8"] == plain:
                    unit["files"]["int8"], unit["packed"] = file, {"int8": whole}
                    self.numbers[f"export.{beside}.bytes_packed"] = size
            total += size - whole["bytes"]
        self.numbers["export.bytes_packed"] = total
        packed.write_format(self.folder)

    def _finish(self, own_size: str) -> None:
        """Writes the manifest last, and reads the whole bundle as its user will."""
        held = self._memory()
        for size in self.sizes:
            size.note_accelerators(self.variants.precisions)
        for size in self.others.values():
            self.numbers |= size.measured()
        if self.form == "packed":
            self._pack()
        manifest = {
            "schema": client.PACKED_SCHEMA if self.form == "packed" else client.MANIFEST_SCHEMA,
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
        if self.others:
            own = {"program": "program.json", "golden": "golden", "units": {}}
            manifest["sizes"] = {own_size: own, **{name: size.describe() for name, size in self.others.items()}}
        (self.folder / "README.md").write_text(readme(manifest, self.program), "utf-8")
        manifest["files"] = fingerprints(self.folder)
        write_json(self.folder / "manifest.json", manifest)
        failed = [f"{c.name}: {c.finding}" for c in verify.checks(self.folder) if not c.passed]
        if failed:
            raise compare.VerificationError("the bundle fails its own verify.py:\n  " + "\n  ".join(failed))
