"""A plan at one image size, on its way into a bundle.

A bundle has one of these for each image size that it offers. They share the files of weights: a unit whose inputs
depend on the size has one signature for each, `<unit>` for the bundle's own size and `<unit>_<H>x<W>` for another.
"""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from snapgen_jax.export import compare, golden, program, verify
from snapgen_jax.export.flatbuffer import Description
from snapgen_jax.export.manifest import Ranges, describe_unit, write_json
from snapgen_jax.export.precision import QUANTISED, Precision
from snapgen_jax.export.program import Flow, Program
from snapgen_jax.export.sampler import Arrays, Sampler
from snapgen_jax.export.storage import describe_storage
from snapgen_jax.export.unit_files import GPUCheck, UnitFiles
from snapgen_jax.export.variants import Variants
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs

Reference = Callable[[Mapping[str, np.ndarray], np.ndarray | None], Mapping[str, np.ndarray]]
"""`({input: [N, ...]}, noise [N, *noise_shape] or None) -> {output: [N, ...]}`"""
# What manifest.json says of a unit at another size; all else is that of its own size.
BY_SIZE = (
    "signature", "inputs", "outputs", "input_order", "output_order", "rel_l2", "gpu", "max_activation",
    "accelerators_verified",
)  # fmt: skip


class Sized:
    """A plan at one image size, step by step.

    Args:
        plan: of that size.
        weights: of the recipe.
        folder: of the bundle.
        gpu_check: see `export_bundle`.
        size: the name of another size than the bundle's own, "96x64".
        own: the units at the bundle's own size.

    Attributes:
        numbers: what was measured, see `BundleReport`.
        described: {unit: what the manifest says of it}.
        arrays: the golden arrays, see `golden.run`.
        storage: {unit: its weights of few levels}.

    Raises:
        ValueError: the program does not fit the plan, or the plan not that of the bundle's own size.
    """

    def __init__(
        self,
        plan: ExportPlan,
        weights: Mapping[str, Any],
        folder: pathlib.Path,
        gpu_check: GPUCheck,
        size: str = "",
        own: Mapping[str, ExportUnit] | None = None,
    ) -> None:
        self.plan, self.program, self.size = plan, parsed(plan), size
        self.units = {unit.name: unit for unit in plan.units}
        own = self.units if own is None else own
        if self.units.keys() != own.keys():
            raise ValueError(f"at {size} the plan has the units {sorted(self.units)}, and else {sorted(own)}")
        self.weights = {name: unit.select(weights) for name, unit in self.units.items()}
        self.storage = {name: unit.stored(weights) for name, unit in self.units.items()}
        described = {name: describe_storage(unit, weights, self.storage[name]) for name, unit in self.units.items()}
        self.shapes = {
            name: {tensor: tuple(spec.shape) for tensor, spec in unit.inputs.items()}
            for name, unit in self.units.items()
        }
        self.signatures = {
            name: name if dict(unit.inputs) == dict(own[name].inputs) else f"{name}_{size}"
            for name, unit in self.units.items()
        }
        self.folder, self._gpu_check = folder, gpu_check
        self.files = UnitFiles(folder, gpu_check, described, self.signatures, _stems(plan))
        self.numbers, self.described = self.files.numbers, self.files.described
        self.arrays: Arrays = {}
        self.tolerances: dict[str, Any] = {}

    def draw_golden(self, given: GoldenInputs | None, tokenizers: Mapping[str, pathlib.Path]) -> None:
        """Runs the golden examples in JAX; from the plan's own inputs where none are given."""
        self.given = self.plan.golden if given is None else given
        begin, noise = golden.begin(self.program, self.given, tokenizers)
        self.jax_units = {name: compare.jax_unit(unit, self.weights[name]) for name, unit in self.units.items()}
        self._ranges, self._calls = Ranges(), golden.Calls()
        watched = {
            name: self._calls.watch(name, self._ranges.watch(name, unit)) for name, unit in self.jax_units.items()
        }
        self.arrays = golden.run(Sampler(self.program, watched, self.shapes), begin, noise, golden.RECORDED)

    def compare_f32(self, descriptions: Mapping[str, Description]) -> None:
        """Holds the float32 files to JAX."""
        for name in self.units:
            free = golden.takes_any_time(self.program, name)
            exact = Sampler(self.program, self.jax_units, self.shapes)
            cases = golden.denoiser_cases(exact, self.arrays) if free else self._calls.cases(name)
            described = describe_unit(name, self.signatures[name], descriptions[name], self._ranges)
            self.files.begin(name, described, self.jax_units[name], cases, cpu_only=self.units[name].branches)
            self.files.compare(name, "f32")

    def for_gpu(self, name: str) -> bool:
        """Whether a phone's GPU runs a unit. No GPU has an IF; and none has a gather, which reads an embedding table:
        an encoder of token ids is for the CPU."""
        if self.units[name].branches:
            return False
        encoders = self.program.encoders() if isinstance(self.program, Flow) else set()
        ids = any(np.issubdtype(spec.dtype, np.integer) for spec in self.units[name].inputs.values())
        return not (name in encoders and ids)

    def note_activations(self, log: Any) -> None:
        """Notes how large numbers have grown in the float32 files, and holds them to float16."""
        for name, seen in self.files.activations.items():
            self.numbers[f"export.{name}.max_activation"] = seen.value
            self.described[name]["max_activation"] = {"value": seen.value, "tensor": seen.tensor, "calls": seen.calls}
            if self._gpu_check == "check" and self.for_gpu(name):
                seen.hold(name)
            elif not seen.value <= compare.FLOAT16_HEADROOM:
                log.warning(
                    "%s: |%s| reaches %.3g, and float16 ends at 65504: on a GPU, ask for float32 arithmetic",
                    name, seen.tensor, seen.value,
                )  # fmt: skip

    def litert(self, precision: Precision) -> Sampler:
        """The program over the files of a precision."""
        units = self.files.load_all(self.files.paths(precision))
        return Sampler(self.program, units, self.shapes)

    def measure(self, precision: Precision, variants: Variants) -> None:
        """Notes the tolerances of the golden arrays in a precision, and how close LiteRT comes here."""
        inputs, noise = golden.inputs_of(self.arrays), self.arrays.get("noise")
        found = golden.run(self.litert(precision), inputs, noise)
        if noise is not None:
            last = max(map(verify.relative_l2, found["latents"][:, -1], self.arrays["latents"][:, -1]))
            self.numbers[f"export.trajectory.rel_l2_{precision}"] = last
        if precision == "f32":
            for name in self.program.outputs:
                kind, error = self._difference(name, found[f"outputs/{name}"])
                self.numbers[f"export.{name}.{kind}_f32"] = error
        if precision not in QUANTISED:
            self.tolerances[precision] = golden.tolerances(self.litert("f32"), self.arrays, precision)
            return
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as scratch:
            floats = variants.in_floats(precision, self.files.paths("f32"), pathlib.Path(scratch), self.storage)
            units = self.files.load_all(floats)
            other = golden.run(Sampler(self.program, units, self.shapes), inputs, noise)
        self.tolerances[precision] = golden.measured_tolerances(self.program, self.arrays, (found, other))

    def hold_outputs(self, reference: Reference) -> None:
        """The golden outputs against those of an independent sampler."""
        made = reference(golden.inputs_of(self.arrays), self.arrays.get("noise"))
        if missing := [name for name in self.program.outputs if name not in made]:
            raise compare.VerificationError(
                f"the recipe's own generator gives {', '.join(made)}, and the program also {', '.join(missing)}"
            )
        limits = {"max_grey": 1, "rel_l2": golden.SAFETY * compare.LIMITS["f32"]}
        for name in self.program.outputs:
            kind, worst = self._difference(name, np.asarray(made[name]))
            self.numbers[f"export.{name}.{kind}_to_generator"] = worst
            if not worst <= limits[kind]:
                measure = "grey levels" if kind == "max_grey" else "in relative L2"
                raise compare.VerificationError(
                    f"{name}: the client's sampler and the recipe's own differ by {worst:g} {measure} for the same "
                    f"inputs and noise; {limits[kind]:g} is accepted. Does program.json say what the recipe does? "
                    "Nothing was written."
                )

    def forget(self, precision: Precision) -> None:
        """Takes back all that was written and noted of a precision."""
        self.files.forget(precision)
        self.tolerances.pop(precision, None)

    def write_golden(self, precisions: tuple[Precision, ...]) -> None:
        """Writes the golden arrays, and golden.json."""
        folder = self.folder / "golden" / self.size
        for name, array in {**self.arrays, **golden.self_test(self._calls, self.jax_units)}.items():
            path = folder / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array, allow_pickle=False)
        count = len(next(iter(self.arrays.values())))
        facts = {"prompts": list(self.given.prompts), "seed": self.given.seed, "examples": count}
        facts["tolerances"] = self.tolerances
        facts["self_test"] = {precision: self._self_test(precision) for precision in precisions}
        facts["gpu_factor"] = {p: compare.GPU_LIMITS[p] / compare.LIMITS[p] for p in precisions}
        write_json(folder / "golden.json", facts)

    def write_program(self) -> str:
        """Writes the program; returns the name of its file."""
        name = f"programs/{self.size}.json" if self.size else "program.json"
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        write_json(path, self.plan.program)
        return name

    def note_accelerators(self, precisions: tuple[Precision, ...]) -> None:
        """Notes of each unit where it was compared with JAX."""
        for unit in self.described.values():
            unit["accelerators_verified"] = {
                "cpu": list(precisions),
                "gpu": [p for p in precisions if unit["gpu"]["checked"] and p in unit["gpu"]["rel_l2"]],
            }

    def describe(self) -> dict[str, Any]:
        """What `sizes` in manifest.json says of another size."""
        units = {name: {key: unit[key] for key in BY_SIZE} for name, unit in self.described.items()}
        return {"program": f"programs/{self.size}.json", "golden": f"golden/{self.size}", "units": units}

    def measured(self) -> dict[str, float]:
        """The numbers of another size by names that have it in them; its files are those of all sizes."""
        return {
            number.replace("export.", f"export.{self.size}.", 1): value
            for number, value in self.numbers.items()
            if "bytes_" not in number
        }

    def _self_test(self, precision: Precision) -> float:
        """How far a recorded call may be off on an accelerator for a client to use it: relative L2."""
        worst = max(self.numbers[f"export.{name}.rel_l2_{precision}"] for name in self.units)
        return 2 * worst + golden.SELF_TEST

    def _difference(self, name: str, made: np.ndarray) -> tuple[str, float]:
        """How far an output is from the golden one: ("max_grey", levels) or ("rel_l2", error)."""
        expected = self.arrays[f"outputs/{name}"]
        if self.program.outputs[name].dtype == "uint8":
            return "max_grey", int(verify.grey_levels(made, expected).max())
        return "rel_l2", max(map(verify.relative_l2, made, expected))


def _stems(plan: ExportPlan) -> dict[str, str]:
    """{unit: the stem of its file}. Raises `ValueError` where units of one file have other weights."""
    first: dict[str, ExportUnit] = {}
    for unit in plan.units:
        of_file = first.setdefault(unit.stem, unit)
        if (unit.roles, unit.part, unit.storage) != (of_file.roles, of_file.part, of_file.storage):
            raise ValueError(
                f"the units {of_file.name!r} and {unit.name!r} are of one file, {unit.stem!r}, and have other roles, "
                "parts or storage; a file has one set of weights: give them the same, or other files"
            )
    return {unit.name: unit.stem for unit in plan.units}


def parsed(plan: ExportPlan) -> Program:
    """The program of a plan, held against its units. Raises `ValueError` that names what does not fit."""
    try:
        found = program.parse(json.loads(json.dumps(plan.program, allow_nan=False)))
    except TypeError as error:
        raise ValueError(f"the plan's program is no plain JSON: {error}") from error
    names = [unit.name for unit in plan.units]
    stems = [unit.stem for unit in plan.units]
    if bad := [
        name for name in [*names, *stems, *found.inputs, *found.outputs] if not re.fullmatch(r"[a-z0-9_]+", name)
    ]:
        raise ValueError(f"{bad[0]!r} is no name of a file: lower-case letters, digits and underscores are")
    if set(names) != found.units() or len(set(names)) < len(names):
        raise ValueError(f"the program calls the units {sorted(found.units())}; the plan has {names}")
    if both := set(names) & set(found.outputs):
        raise ValueError(f"{both.pop()!r} is both a unit and an output; rename one")
    return found
