"""What `snapgen adapters` does: a run's adapters as files of peft, and a network's own images to remember by."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from snapgen_jax.config import resolve
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load, load_config, load_recipe, load_weights
from snapgen_jax.recipes.adapters import ROLE, Adapters
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import on_object_store, write_whole
from snapgen_jax.weights.peft import write_peft

Tree = Any


def export_adapters(workdir: epath.PathLike, out: str, step: int | None = None) -> list[pathlib.Path]:
    """Writes the adapters of a run as peft's files, a folder for each network: `out/unet`, `out/text`.

    Args:
        workdir: a run of the recipe `adapters`.
        out: local folder.
        step: which checkpoint; the newest by default.

    Returns:
        The folders.

    Raises:
        ConfigError: the run trained no adapters, has no checkpoint, or `out` is in an object store.
    """
    if on_object_store(out):
        raise ConfigError(f"adapters are written to local files, and {out} is not; give --out a local folder")
    recipe = load_recipe(workdir)
    if not isinstance(recipe, Adapters):
        raise ConfigError(f"{workdir} trained no adapters; train some with the recipe 'adapters'")
    adapters = load_weights(workdir, recipe, step)["model"][ROLE]
    config, networks, folders = recipe.config, recipe.method.networks(), []
    for role, tree in adapters.items():
        folders.append(pathlib.Path(out) / role)
        lora = {"rank": config.lora.rank, "alpha": config.lora.alpha}
        write_peft(folders[-1], tree, networks[role].config, base=config.base, **lora)
    return folders


def draw_prior(
    workdir: epath.PathLike, out: str, count: int = 200, prompts: Sequence[str] = (), seed: int = 0
) -> pathlib.Path:
    """Draws images by a trained run, for the prior of adapters: a folder of PNG files with `metadata.jsonl`.

    Args:
        workdir: the run.
        out: local folder.
        count: images.
        prompts: what to draw, in turn; by default captions of the run's own training data.
        seed: image n comes from (seed, n).

    Returns:
        The folder.

    Raises:
        ConfigError: the run takes no prompts, or `out` is in an object store or holds images already.
    """
    folder = epath.Path(out)
    if on_object_store(folder):
        raise ConfigError(f"the images are written to local files, and {out} is not; give --out a local folder")
    if (folder / "metadata.jsonl").exists():
        raise ConfigError(f"{out} holds images already; give --out another folder, or delete it")
    if count < 1:
        raise ConfigError(f"--count is {count}; give 1 or more")
    generator = load(workdir)
    texts = [prompts[n % len(prompts)] for n in range(count)] if prompts else _captions(workdir, count, seed)
    try:
        images = generator.generate(texts, seed=seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    lines = []
    for n, (image, text) in enumerate(zip(images, texts, strict=True)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        write_whole(folder / f"{n:05d}.png", file.getvalue())
        lines.append(json.dumps({"file_name": f"{n:05d}.png", "text": text}) + "\n")
    write_whole(folder / "metadata.jsonl", "".join(lines))
    return pathlib.Path(out)


def _captions(workdir: epath.PathLike, count: int, seed: int) -> list[str]:
    """Captions of a run's training examples."""
    source = Experiment(resolve(load_config(workdir), name=str(workdir)), workdir).source
    if "caption" not in source.spec():
        raise ConfigError(f"the data of {workdir} have no captions; give --prompt")
    rng = np.random.default_rng(seed)
    places = rng.integers(len(source), size=count)
    return [source.example(int(place), rng, ("caption",))["caption"] for place in places]
