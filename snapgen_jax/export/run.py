"""A trained run to a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath

from snapgen_jax.evaluation.compositional import PER_CATEGORY, fixed_prompts
from snapgen_jax.evaluation.detector import detect
from snapgen_jax.export.bundle import GPUCheck, check_place, export_bundle, generator_of
from snapgen_jax.export.convert import Backend, require
from snapgen_jax.export.frames import spelled_out
from snapgen_jax.export.judging import LIMITS, Judge, Limits, VariantError
from snapgen_jax.export.latents import Carried, load_latents, save_tokenizers
from snapgen_jax.export.manifest import About
from snapgen_jax.export.mixed import BUDGET, Budget
from snapgen_jax.export.precision import Precision
from snapgen_jax.generation import load_config, load_weights, with_adapters
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import on_object_store


def export_run(
    workdir: epath.PathLike,
    out: epath.PathLike,
    backend: Backend = "jax2tf",
    decoder: epath.PathLike | None = None,
    gpu_check: GPUCheck = "check",
    carried: Carried | None = None,
    precisions: Sequence[Precision] | None = None,
    adapters: str | os.PathLike[str] | None = None,
    limits: Limits = LIMITS,
    budget: Budget = BUDGET,
    title: str = "",
    licence: str = "",
) -> dict[str, float]:
    """Exports a trained run as a bundle for phones, checked against JAX on the way.

    Args:
        workdir: the run.
        out: the bundle's folder.
        backend: which converter.
        decoder: a run of a tiny decoder that takes the place of the codec's decoder; for a run on latents also a run or
            a folder of an autoencoder.
        gpu_check: see `export_bundle`.
        carried: the published text encoders of a run on latents; its decoder is `decoder`.
        precisions, limits, budget: see `export_bundle`.
        adapters: folder of peft's files, which are merged; see `generation.with_adapters`.
        title: the model's name; the workdir's where none is given.
        licence: of the weights, an identifier such as "apache-2.0".

    Returns:
        What was measured, `export.*`.

    Raises:
        ConfigError: `out` is in an object store or holds something else, the backend is not installed, the run cannot
            be exported, or a precision that was given is not good enough.
    """
    if on_object_store(out):
        raise ConfigError(f"a bundle is made of local files, and {out} is not; give --out a local folder, and copy it")
    try:
        check_place(str(out))  # before minutes are spent
        require(backend)
    except (FileExistsError, ImportError) as error:
        raise ConfigError(str(error)) from error
    carried = dataclasses.replace(carried or Carried(), decoder="" if decoder is None else str(decoder))
    recipe = load_latents(workdir, carried)
    params = load_weights(workdir, recipe)
    try:
        recipe.exports()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    frozen = recipe.load_frozen(None, "generate")
    if adapters is not None:
        params, frozen = with_adapters(recipe, params, frozen, pathlib.Path(adapters))
    with tempfile.TemporaryDirectory() as scratch:
        tokenizers = save_tokenizers(recipe, pathlib.Path(scratch))
        if any(spec.kind == "trained" for spec in recipe.tokenizers().values()):
            tokenizers["tokenizer.json"] = pathlib.Path(scratch) / "tokenizer.json"
            text = (epath.Path(workdir) / "tokenizer.json").read_text()
            tokenizers["tokenizer.json"].write_text(spelled_out(text), "utf-8")
        reference = generator_of(recipe, params, frozen)
        try:
            report = export_bundle(
                recipe, params, frozen, tokenizers, str(out),
                backend=backend, reference=reference, gpu_check=gpu_check, precisions=precisions,
                judge=judge_of(recipe, load_config(workdir)), limits=limits, budget=budget,
                about=about_run(workdir, title, licence),
            )  # fmt: skip
        except VariantError as error:
            raise ConfigError(str(error)) from error
    return report.numbers


def about_run(workdir: epath.PathLike, title: str = "", licence: str = "") -> About:
    """The name, licence and provenance of a run: the hash of its config, and the commit that it began at."""
    workdir = epath.Path(workdir)
    provenance: dict[str, str] = {}
    if (config := workdir / "config.json").exists():
        provenance["config_sha256"] = hashlib.sha256(config.read_bytes()).hexdigest()
    if (record := workdir / "run.json").exists():
        provenance["commit"] = json.loads(record.read_text()).get("commit", "")
    return About(title or workdir.name, licence, provenance)


def judge_of(recipe: Any, config: Any) -> Judge | None:
    """The exact score of a run that draws the shapes world from prompts; None where there is no exact score.

    Its prompts are those of `CompositionalScore`, in an order in which all categories have had as many at any time.
    """
    program = recipe.exports().program
    told = {name for entry in program.get("tokenizers", ()) for name in (entry["tokens"], entry.get("mask")) if name}
    image = program["outputs"].get("image", {})
    pictures = image.get("dtype") == "uint8" and len(image["shape"]) == 3 and image["shape"][0] == image["shape"][1]
    shapes = config.data.source == "shapes" or "compositional" in {spec.name for spec in recipe.evaluators()}
    if not shapes or not pictures or not told or told != set(program["inputs"]):
        return None
    half = PER_CATEGORY // 2
    order = sorted(range(len(fixed_prompts())), key=lambda i: (i % half, i))
    chosen = [fixed_prompts()[i] for i in order]
    texts = [prompt.prompt for prompt in chosen]
    return Judge("compositional", texts, order, lambda i, image: chosen[i].requirement.met_by(detect(image)))
