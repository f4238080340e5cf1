"""A trained run to a bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from etils import epath

from snapgen_jax.conditions import chosen_options
from snapgen_jax.evaluation.compositional import PER_CATEGORY, fixed_prompts
from snapgen_jax.evaluation.detector import detect
from snapgen_jax.export.bundle import GPUCheck, Sizes, check_place, export_bundle, generator_of
from snapgen_jax.export.client import read_size
from snapgen_jax.export.convert import Backend, require
from snapgen_jax.export.frames import spelled_out
from snapgen_jax.export.judging import LIMITS, Judge, Limits, VariantError
from snapgen_jax.export.latents import Carried, Decoded, load_latents, save_tokenizers
from snapgen_jax.export.manifest import About
from snapgen_jax.export.mixed import BUDGET, Budget
from snapgen_jax.export.packed import NOTHING_PACKED, Form
from snapgen_jax.export.precision import Precision
from snapgen_jax.generation import load_config, load_weights, with_adapters
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import on_object_store


def check_ready(out: epath.PathLike, backend: Backend) -> None:
    """Raises `ConfigError` where a bundle cannot be written to `out`, or its converter is not installed: before minutes
    are spent."""
    if on_object_store(out):
        raise ConfigError(f"a bundle is made of local files, and {out} is not; give --out a local folder, and copy it")
    try:
        check_place(str(out))
        require(backend)
    except (FileExistsError, ImportError) as error:
        raise ConfigError(str(error)) from error


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
    sizes: Sequence[tuple[int, int]] = (),
    form: Form = "plain",
    options: Mapping[str, Any] = MappingProxyType({}),
    provenance: Mapping[str, Any] = MappingProxyType({}),
    begins: Callable[[], None] = lambda: None,
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
        sizes: further image sizes, (height, width); the run's first one is always in the bundle.
        form: "packed" ships weights of few levels packed; see `export_bundle`.
        options: of the run's generator, such as `steps`, that the bundle has in place of the run's own.
        provenance: what the manifest says of these, as plain JSON.
        begins: called when all that was given is read and found fit, before minutes are spent.

    Returns:
        What was measured, `export.*`.

    Raises:
        ConfigError: `out` is in an object store or holds something else, the backend is not installed, the run cannot
            be exported, or not at one of the sizes, or a precision that was given is not good enough.
    """
    check_ready(out, backend)
    carried = dataclasses.replace(carried or Carried(), decoder="" if decoder is None else str(decoder))
    recipe = with_options(load_latents(workdir, carried), options)
    params = load_weights(workdir, recipe)
    try:
        plan = recipe.exports()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if form == "packed" and not any(unit.storage for unit in plan.units):
        raise ConfigError(f"--packed: {NOTHING_PACKED}")
    if backend != "jax2tf" and any(unit.branches for unit in plan.units):
        raise ConfigError(f"branches are written by --backend=jax2tf, and the backend is {backend}; leave it out")
    offered = at_sizes(recipe, sizes)
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
        begins()
        try:
            report = export_bundle(
                recipe, params, frozen, tokenizers, str(out),
                backend=backend, reference=reference, gpu_check=gpu_check, precisions=precisions,
                judge=judge_of(recipe, load_config(workdir)), limits=limits, budget=budget,
                about=about_run(workdir, title, licence, provenance), sizes=offered, form=form,
            )  # fmt: skip
        except VariantError as error:
            raise ConfigError(str(error)) from error
    return report.numbers


def with_options(recipe: Any, options: Mapping[str, Any]) -> Any:
    """A recipe whose generator has other options of its own.

    Raises:
        ConfigError: it has no such option, or does not take the value.
    """
    if not options:
        return recipe
    if isinstance(recipe, Decoded):
        return dataclasses.replace(recipe, recipe=with_options(recipe.recipe, options))
    chosen = chosen_options(recipe.options, options)
    return type(recipe)(dataclasses.replace(recipe.config, sampling=chosen), "cpu")


def at_sizes(recipe: Any, sizes: Sequence[tuple[int, int]]) -> Sizes:
    """A recipe at further image sizes than the first of its inputs, over the same weights.

    Raises:
        ConfigError: the inputs have no image sizes, the recipe is none at a size, or its weights depend on it.
    """
    if not sizes:
        return Sizes()
    if isinstance(recipe, Decoded) or not hasattr(recipe.config.inputs, "image_sizes"):
        raise ConfigError(
            "--sizes: the image size of this run is not that of its inputs' `image_sizes`; leave out --sizes"
        )
    own, others = recipe.config.inputs.image_sizes[0], {}
    for size in dict.fromkeys(size for size in sizes if size != tuple(own)):
        name = _name(size)
        try:
            inputs = dataclasses.replace(recipe.config.inputs, image_sizes=(size,))
            other = type(recipe)(dataclasses.replace(recipe.config, inputs=inputs), "cpu")
            other.exports()
            weights = _weights(other)
        except ValueError as error:
            raise ConfigError(f"--sizes: this run does not draw images of {name}: {error}") from error
        if unlike := [role for role, shapes in _weights(recipe).items() if weights[role] != shapes]:
            raise ConfigError(
                f"--sizes: the weights of {', '.join(unlike)} depend on the image size, and those of {_name(own)} are "
                f"none of {name}; leave {name} out, or train at that size and export that run"
            )
        others[name] = other
    return Sizes(_name(own), others)


def image_sizes(text: str | None) -> list[tuple[int, int]]:
    """The sizes of "64x64,96x64", (height, width). Raises `ConfigError` where it is no such list."""
    try:
        return [read_size(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        raise ConfigError(f"--sizes={text}: {error}") from error


def image_size(text: str | None) -> tuple[int, int] | None:
    """The (height, width) of "96x64"; None where nothing is given. Raises `ConfigError` where it is no size."""
    try:
        return None if text is None else read_size(text)
    except ValueError as error:
        raise ConfigError(f"--size={text}: {error}") from error


def _name(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _weights(recipe: Any) -> dict[str, Any]:
    """{role: shapes of its weights}, of those that are trained."""
    players = jax.eval_shape(lambda key: recipe.init(key).players, jax.random.key(0))
    return {
        role: jax.tree.map(lambda leaf: leaf.shape, tree)
        for player in players.values()
        for role, tree in player.params.items()
    }


def about_run(
    workdir: epath.PathLike, title: str = "", licence: str = "", further: Mapping[str, Any] = MappingProxyType({})
) -> About:
    """The name, licence and provenance of a run: the hash of its config, the commit that it began at, and `further`."""
    workdir = epath.Path(workdir)
    provenance: dict[str, Any] = dict(further)
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
