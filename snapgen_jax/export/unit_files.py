"""The files of an export's units: where they lie, and what the manifest says of them.

Each is compared with JAX on LiteRT's CPU and, where a driver is found, on its GPU accelerator.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from snapgen_jax.export import client, compare, gpu
from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.precision import Precision, weights_of
from snapgen_jax.export.sampler import Arrays, Unit

GPUCheck = Literal["check", "skip"]
BY_PRECISION = ("files", "operators", "weights", "rel_l2")

log = logging.getLogger(__name__)


class UnitFiles:
    """The files of all units in all precisions.

    Attributes:
        described: {unit: what the manifest says of it}.
        numbers: what was measured, see `BundleReport`.
        activations: {unit: how large numbers grow in its float32 file}.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        gpu_check: GPUCheck,
        storage: Mapping[str, Mapping[str, Any]],
        signatures: Mapping[str, str],
        stems: Mapping[str, str],
    ) -> None:
        self.folder, self._signatures, self._stems = folder, signatures, stems
        self.described: dict[str, dict[str, Any]] = {}
        self.numbers: dict[str, float] = {}
        self.activations: dict[str, compare.Activations] = {}
        self._gpu_check, self._storage = gpu_check, storage
        self._cases: dict[str, Mapping[str, Arrays]] = {}
        self._references: dict[str, Unit] = {}

    def path(self, name: str, precision: Precision) -> pathlib.Path:
        """Where a unit's file lies, or will."""
        return self.folder / f"{self._stems[name]}_{precision}.tflite"

    def paths(self, precision: Precision) -> dict[str, pathlib.Path]:
        """{unit: where its file lies, or will}."""
        return {name: self.path(name, precision) for name in self._stems}

    def load(self, name: str, path: pathlib.Path) -> Unit:
        """A unit's function on LiteRT's CPU, of a file with its signature."""
        return self.load_all({name: path})[name]

    def load_all(self, paths: Mapping[str, pathlib.Path]) -> dict[str, Unit]:
        """The functions of units in these files, each of which is loaded once."""
        loaded: dict[pathlib.Path, Any] = {}
        return {name: client.litert_unit(path, self._signatures[name], loaded=loaded) for name, path in paths.items()}

    def begin(
        self,
        name: str,
        described: Mapping[str, Any],
        reference: Unit,
        cases: Mapping[str, Arrays],
        cpu_only: bool = False,
    ) -> None:
        """A unit: its signature as the manifest describes it, its function in JAX, and the calls to compare at;
        `cpu_only` where it has branches."""
        checked = {"checked": True, "fully_accelerated": {}, "rel_l2": {}}
        skipped = {"checked": False, "reason": "--gpu=skip"}
        branches = {"checked": False, "reason": "it has branches (IF), which run on a CPU only"}
        self._references[name], self._cases[name] = reference, cases
        self.described[name] = {kind: {} for kind in BY_PRECISION}
        gpu = branches if cpu_only else checked if self._gpu_check == "check" else skipped
        self.described[name] |= {"gpu": gpu, "cpu_only": cpu_only, **described}
        if self._storage[name]:
            self.described[name]["storage"] = self._storage[name]

    def compare(self, name: str, precision: Precision) -> None:
        """A file on LiteRT against JAX; of float32, also the size of the numbers on the way.

        Raises:
            VerificationError: it does not compute what JAX computes, on the CPU or on the GPU accelerator.
        """
        path, cases, found = self.path(name, precision), self._cases[name], self.described[name]
        try:
            errors = compare.compare(self._references[name], self.load(name, path), cases)
        except (RuntimeError, ValueError) as error:  # LiteRT's
            raise compare.VerificationError(f"{name} in {precision} does not run on LiteRT: {error}") from error
        compare.hold(name, precision, errors)
        if precision == "f32":
            activations = self.activations[name] = compare.Activations(path, self._signatures[name])
            for inputs in cases.values():
                activations.look(inputs)
        description, size = describe(path), path.stat().st_size
        found["files"][precision], found["rel_l2"][precision] = path.name, errors
        found["operators"][precision] = description.histogram_of(self._signatures[name])
        found["weights"][precision] = weights_of(description)
        self.numbers[f"export.{name}.rel_l2_{precision}"] = max(errors.values())
        self.numbers[f"export.{name}.bytes_{precision}"] = size
        files = {unit["files"][precision] for unit in self.described.values() if precision in unit["files"]}
        self.numbers[f"export.bytes_{precision}"] = sum((self.folder / file).stat().st_size for file in files)
        if found["gpu"]["checked"]:
            self._on_gpu(name, precision)

    def forget(self, precision: Precision) -> None:
        """Takes back all that was written and noted of a precision."""
        for name, unit in self.described.items():
            self.path(name, precision).unlink(missing_ok=True)
            on_gpu = [unit["gpu"].get(kind, {}) for kind in ("fully_accelerated", "rel_l2")]
            for noted in (*(unit[kind] for kind in BY_PRECISION), *on_gpu):
                noted.pop(precision, None)
        ends = (f"_{precision}", "_gpu") if precision == "f32" else (f"_{precision}",)
        for number in [number for number in self.numbers if number.endswith(ends)]:
            del self.numbers[number]

    def _on_gpu(self, name: str, precision: Precision) -> None:
        """A unit's file on LiteRT's GPU accelerator: notes for the manifest what was found, or why nothing was."""
        cases, found, reference = self._cases[name], self.described[name]["gpu"], self._references[name]
        chosen = {case: cases[case] for case in list(cases)[:: max(1, len(cases) // 2)]}
        try:
            run = gpu.run(self.path(name, precision), self._signatures[name], list(chosen.values()))
        except (gpu.NoGPUError, gpu.GPURunError) as error:
            log.warning("%s in %s was NOT checked on a GPU accelerator: %s", name, precision, error)
            self.described[name]["gpu"] = {"checked": False, "reason": str(error)}
            return
        except gpu.GPURefusedError as error:
            raise compare.VerificationError(
                f"{error}\n--gpu=skip exports it nevertheless. Nothing was written."
            ) from error
        expected = {case: reference(**inputs) for case, inputs in chosen.items()}
        outputs = dict(zip(chosen, run.outputs, strict=True))
        errors = {case: compare.worst(expected[case], outputs[case]) for case in chosen}
        compare.hold(name, precision, errors, "GPU")
        found["fully_accelerated"][precision], found["rel_l2"][precision] = run.whole, errors
        number = "rel_l2_gpu" if precision == "f32" else f"rel_l2_gpu_{precision}"
        self.numbers[f"export.{name}.{number}"] = max(errors.values())
