"""A trained recipe to a bundle: a folder that a phone's client needs nothing else to load, check and run.

    manifest.json     what is here: units, signatures, shapes, ranges, operators, errors, versions, SHA-256 of each file
    <unit>_f32.tflite, <unit>_f16.tflite
    scheduler.json    the sampler as data; its schema stands at the top of client.py
    tokenizer.json    of the `tokenizers` library
    golden/           .npy arrays and golden.json: prompts, tolerances
    client.py         numpy and ai-edge-litert alone
    verify.py         checks all of this, with the same two libraries
    README.md         for the person who loads it

A bundle is written beside its place under another name, verified there, and moved: it is whole or it is not there.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from snapgen_jax.export import client, compare, golden, verify
from snapgen_jax.export.client import Arrays, Sampler, Scheduler, Unit
from snapgen_jax.export.compat import Requirements, check, flex_operators
from snapgen_jax.export.convert import Backend, to_tflite
from snapgen_jax.export.flatbuffer import Description, describe
from snapgen_jax.export.manifest import Ranges, describe_unit, fingerprints, versions, write_json
from snapgen_jax.export.precision import PRECISIONS, Precision, cast_float16
from snapgen_jax.export.readme import readme
from snapgen_jax.training.recipe import ExportUnit, Recipe, frozen_for_generation

Reference = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
GOLDEN_PROMPTS = ("a red circle left of a blue square", "two green stars")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BundleReport:
    """Where a bundle is, and what was measured while it was made.

    Attributes:
        folder: the bundle.
        numbers: for each unit `export.<unit>.rel_l2_<precision>` (the worst case), `.bytes_<precision>`,
            `.max_activation`, `.convert_seconds` (the first unit's includes loading the converter); over all units
            `export.bytes_<precision>` and `export.flex_ops`; of whole trajectories
            `export.trajectory.rel_l2_<precision>` (the last latent), `export.image.max_grey_f32`, and
            `export.image.max_grey_to_generator` against the recipe's own sampler.
        operators: {unit: {operator: nodes}} of the float32 files.
    """

    folder: pathlib.Path
    numbers: dict[str, float]
    operators: dict[str, dict[str, int]]


def export_bundle(
    recipe: Recipe,
    params: Any,
    tokenizer_path: str | pathlib.Path,
    out_dir: str | pathlib.Path,
    *,
    precisions: Sequence[Precision] = PRECISIONS,
    backend: Backend = "jax2tf",
    prompts: Sequence[str] = GOLDEN_PROMPTS,
    seed: int = 0,
    reference: Reference | None = None,
    frozen: Any = None,
) -> BundleReport:
    """Exports a recipe's generator.

    Args:
        recipe: whose `exports()` names the units and the sampler. Build it for the platform "cpu" where its own
            generator is to be the reference.
        params: `{player: parameters}`, the averaged ones as a rule.
        tokenizer_path: the tokenizer.json that the recipe was trained with.
        out_dir: the bundle's folder. One that holds a bundle is replaced; any other that is not empty is refused.
        precisions: weights to write, of "f32" and "f16".
        backend: see `to_tflite`.
        prompts: of the golden examples, at least one.
        seed: of their noise.
        reference: `(tokens [N, L], mask [N, L], noise [N, *noise_shape]) -> uint8 [N, H, W, 3]`, an independent sampler
            over the same weights; `generator_of(recipe, params)` is the recipe's own. Its images may differ by one grey
            level from those of the float32 files.
        frozen: the recipe's frozen networks, where they are at hand; read by the recipe otherwise.

    Raises:
        IncompatibleModelError: a file holds what a phone does not run.
        VerificationError: a file does not compute what JAX computes. Both leave `out_dir` as it was.
    """
    out_dir = pathlib.Path(out_dir).absolute()
    if not prompts:
        raise ValueError("a bundle needs at least one golden prompt")
    if not precisions or set(precisions) - set(PRECISIONS):
        raise ValueError(f"precisions are some of {', '.join(PRECISIONS)}; got {list(precisions)}")
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "manifest.json").is_file():
        raise FileExistsError(f"{out_dir} holds files and is no bundle; name another folder, or empty this one")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.partial.", dir=out_dir.parent) as scratch:
        held = {**params, "frozen": frozen_for_generation(recipe) if frozen is None else frozen}
        export = _Export(recipe, held, pathlib.Path(scratch) / "bundle", tuple(precisions), backend)
        report = export.run(pathlib.Path(tokenizer_path), list(prompts), seed, reference)
        if out_dir.exists():
            out_dir.rename(pathlib.Path(scratch) / "before")
        report.folder.rename(out_dir)
    return dataclasses.replace(report, folder=out_dir)


def generator_of(recipe: Recipe, params: Any, frozen: Any = None) -> Reference:
    """The recipe's own sampler as a reference: `generate` with the noise given among its conditions.

    `frozen` are the recipe's frozen networks, where they are at hand.
    """

    def run(tokens: np.ndarray, mask: np.ndarray, noise: np.ndarray) -> np.ndarray:
        cpu = compare.cpu_device()
        with jax.default_device(cpu):
            weights = jax.device_put(params, cpu)
            keys = jax.random.split(jax.random.key(0), len(tokens))
            conditions = {"tokens": tokens, "mask": mask, "noise": noise}
            given = jax.device_put(frozen_for_generation(recipe) if frozen is None else frozen, cpu)
            made = jax.jit(recipe.generate)(weights, given, conditions, keys)
            return np.asarray(made["image"])

    return run


class _Export:
    """One export, step by step; the state that its steps share."""

    def __init__(
        self, recipe: Recipe, params: Any, folder: pathlib.Path, precisions: tuple[Precision, ...], backend: Backend
    ) -> None:
        plan = recipe.exports()
        self.units = {unit.name: unit for unit in plan.units}
        self.schedule = plan.scheduler
        self.scheduler = Scheduler.parse(plan.scheduler)
        for name in [*self.units, *self.scheduler.units.values()]:
            if name not in self.units or not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(
                    f"the scheduler's units are {dict(self.scheduler.units)}; the plan has {list(self.units)}"
                )
        self.params = params
        self.folder, self.precisions = folder, precisions
        self.backend: Backend = backend
        self.inputs = {name: tuple(unit.inputs) for name, unit in self.units.items()}
        self.numbers: dict[str, float] = {}
        self.described: dict[str, dict[str, Any]] = {}

    def run(self, tokenizer: pathlib.Path, prompts: list[str], seed: int, reference: Reference | None) -> BundleReport:
        self.folder.mkdir()
        (self.folder / "golden").mkdir()
        shutil.copyfile(tokenizer, self.folder / "tokenizer.json")
        for module in (client, verify):
            shutil.copyfile(str(module.__file__), self.folder / pathlib.Path(str(module.__file__)).name)
        write_json(self.folder / "scheduler.json", self.schedule)

        tokens, mask = client.tokenize(tokenizer, prompts, self.scheduler.text)
        noise = np.stack([client.draw_noise(seed, i, self.scheduler.noise_shape()) for i in range(len(prompts))])
        jax_units = {name: compare.jax_unit(unit, self.params) for name, unit in self.units.items()}
        ranges = Ranges()
        watched = {name: ranges.watch(name, unit) for name, unit in jax_units.items()}
        log.info("golden trajectories of %d prompts in JAX", len(prompts))
        arrays = golden.run(Sampler(self.scheduler, watched, self.inputs), tokens, mask, noise)

        descriptions = {name: self._convert(unit) for name, unit in self.units.items()}
        for name, unit in self.units.items():
            self._compare(unit, jax_units[name], self._cases(name, arrays))
            self.described[name] |= describe_unit(name, descriptions[name], ranges)
        tolerances = self._trajectories(arrays)
        if reference is not None:
            self._images(reference, arrays)

        for name, array in arrays.items():
            np.save(self.folder / "golden" / f"{name}.npy", array, allow_pickle=False)
        facts = {"prompts": prompts, "seed": seed, "tolerances": tolerances}
        write_json(self.folder / "golden" / "golden.json", facts)
        self._finish()
        operators = {name: description.histogram for name, description in descriptions.items()}
        return BundleReport(self.folder, self.numbers, operators)

    def _path(self, name: str, precision: Precision) -> pathlib.Path:
        return self.folder / f"{name}_{precision}.tflite"

    def _convert(self, unit: ExportUnit) -> Description:
        """Writes every precision of a unit and holds each file to what phones take."""
        # An embedding table is read by a gather, which no GPU runs: a text encoder is for the CPU.
        wanted = Requirements(gpu=unit.name != self.scheduler.units["text_encoder"])
        f32 = self._path(unit.name, "f32")
        log.info("converting %s by %s", unit.name, self.backend)
        start = time.perf_counter()
        to_tflite(unit.function, unit.select(self.params), unit.inputs, unit.name, f32, self.backend)
        self.numbers[f"export.{unit.name}.convert_seconds"] = time.perf_counter() - start
        description = check(f32, wanted)
        if "f16" in self.precisions:
            check(cast_float16(f32, self._path(unit.name, "f16")), wanted)
        flex = flex_operators(description)
        self.numbers["export.flex_ops"] = self.numbers.get("export.flex_ops", 0) + flex
        for precision in self.precisions:
            size = self._path(unit.name, precision).stat().st_size
            self.numbers[f"export.{unit.name}.bytes_{precision}"] = size
            total = f"export.bytes_{precision}"
            self.numbers[total] = self.numbers.get(total, 0) + size
        return description

    def _cases(self, name: str, arrays: Arrays) -> dict[str, Arrays]:
        if name == self.scheduler.units["denoiser"]:
            return golden.denoiser_cases(arrays, self.scheduler)
        if name == self.scheduler.units.get("decoder"):
            return golden.decoder_cases(arrays)
        return golden.text_cases(arrays)

    def _compare(self, unit: ExportUnit, reference: Unit, cases: Mapping[str, Arrays]) -> None:
        """LiteRT against JAX, and the size of the numbers on the way."""
        errors = {}
        for precision in self.precisions:
            candidate = client.litert_unit(self._path(unit.name, precision), unit.name)
            errors[precision] = compare.compare(reference, candidate, cases)
            compare.hold(unit.name, precision, errors[precision])
            self.numbers[f"export.{unit.name}.rel_l2_{precision}"] = max(errors[precision].values())
        value, tensor = compare.largest_activation(self._path(unit.name, "f32"), unit.name, cases)
        self.numbers[f"export.{unit.name}.max_activation"] = value
        if value > compare.FLOAT16_HEADROOM:
            log.warning(
                "%s: |%s| reaches %.3g, and float16 ends at 65504: on a GPU, ask for float32 arithmetic",
                unit.name, tensor, value,
            )  # fmt: skip
        files = {precision: self._path(unit.name, precision) for precision in self.precisions}
        self.described[unit.name] = {
            "files": {precision: path.name for precision, path in files.items()},
            "operators": {precision: describe(path).histogram for precision, path in files.items()},
            "rel_l2": errors,
            "max_activation": {"value": value, "tensor": tensor},
        }

    def _trajectories(self, arrays: Arrays) -> dict[str, Any]:
        """The tolerances of the golden arrays, by precision, and how close LiteRT comes here."""
        tolerances = {}
        exact = self._litert("f32")
        for precision in self.precisions:
            tolerances[precision] = golden.tolerances(exact, arrays, precision)
            found = golden.run(self._litert(precision), arrays["tokens"], arrays["mask"], arrays["noise"])
            last = max(map(verify.relative_l2, found["latents"][:, -1], arrays["latents"][:, -1]))
            self.numbers[f"export.trajectory.rel_l2_{precision}"] = last
            if precision == "f32":
                self.numbers["export.image.max_grey_f32"] = int(
                    verify.grey_levels(found["image"], arrays["image"]).max()
                )
        return tolerances

    def _litert(self, precision: Precision) -> Sampler:
        units = {name: client.litert_unit(self._path(name, precision), name) for name in self.units}
        return Sampler(self.scheduler, units, self.inputs)

    def _images(self, reference: Reference, arrays: Arrays) -> None:
        """The golden images against those of an independent sampler."""
        images = reference(arrays["tokens"], arrays["mask"], arrays["noise"])
        worst = int(verify.grey_levels(images, arrays["image"]).max())
        self.numbers["export.image.max_grey_to_generator"] = worst
        if worst > 1:
            raise compare.VerificationError(
                f"the client's sampler and the recipe's own differ by {worst} grey levels for the same prompt and "
                "noise; 1 is accepted. Does scheduler.json say what the recipe does? Nothing was written."
            )

    def _finish(self) -> None:
        """Writes the manifest last, and reads the whole bundle as its user will."""
        if "f32" not in self.precisions:
            for name in self.units:
                self._path(name, "f32").unlink()
        manifest = {
            "schema": client.SCHEMA,
            "precisions": list(self.precisions),
            "backend": self.backend,
            "units": self.described,
            "measured": self.numbers,
            "versions": versions(),
        }
        (self.folder / "README.md").write_text(readme(manifest, self.scheduler), "utf-8")
        manifest["files"] = fingerprints(self.folder)
        write_json(self.folder / "manifest.json", manifest)
        failed = [f"{c.name}: {c.finding}" for c in verify.checks(self.folder) if not c.passed]
        if failed:
            raise compare.VerificationError("the bundle fails its own verify.py:\n  " + "\n  ".join(failed))
