"""A trained run to a bundle."""

from __future__ import annotations

import pathlib
import tempfile

from etils import epath

from snapgen_jax.export.bundle import GPUCheck, export_bundle, generator_of
from snapgen_jax.export.convert import Backend, require
from snapgen_jax.generation import load
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import on_object_store


def export_run(
    workdir: epath.PathLike,
    out: epath.PathLike,
    backend: Backend = "jax2tf",
    decoder: epath.PathLike | None = None,
    gpu_check: GPUCheck = "check",
    adapters: str | None = None,
) -> dict[str, float]:
    """Exports a trained run as a bundle for phones, checked against JAX on the way.

    Args:
        workdir: the run.
        out: the bundle's folder.
        backend: which converter.
        decoder: a run of a tiny decoder that takes the place of the codec's decoder.
        gpu_check: see `export_bundle`.
        adapters: folder of peft's files, which are merged; see `generation.load`.

    Returns:
        What was measured, `export.*`.

    Raises:
        ConfigError: `out` is in an object store, the backend is not installed, or the run cannot be exported.
    """
    if on_object_store(out):
        raise ConfigError(f"a bundle is made of local files, and {out} is not; give --out a local folder, and copy it")
    try:
        require(backend)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    generator = load(workdir, platform="cpu", decoder=decoder, adapters=adapters)
    recipe, params, frozen = generator.recipe, generator.params, generator.frozen
    try:
        recipe.exports()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = None
        if recipe.tokenizers():
            tokenizer = pathlib.Path(scratch) / "tokenizer.json"
            tokenizer.write_bytes((epath.Path(workdir) / "tokenizer.json").read_bytes())
        reference = generator_of(recipe, params, frozen)
        report = export_bundle(
            recipe, params, frozen, tokenizer, str(out), backend=backend, reference=reference, gpu_check=gpu_check
        )
    return report.numbers
