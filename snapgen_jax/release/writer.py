"""From a workdir to a folder of weights (`weights.folder`): parameters, config, tokenizer, a model card, the runs whose
frozen networks it reads, and its networks as other libraries have them."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args

import jax
from etils import epath

from snapgen_jax.config import Config, from_json, resolve, to_json
from snapgen_jax.generation import load_config, load_weights
from snapgen_jax.networks.module import flatten
from snapgen_jax.release.card import Facts, Licence, model_card
from snapgen_jax.release.layouts import write_counterparts
from snapgen_jax.training.checkpoint import Checkpointer, complete_steps
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import new_folder
from snapgen_jax.training.keys import key
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.folder import (
    MANIFEST,
    MODEL,
    SHARD_BYTES,
    Kept,
    Manifest,
    is_weights_folder,
    parameters,
    read_manifest,
    write_safetensors,
)
from snapgen_jax.weights.frozen import is_published

Tree = Any
TOKENIZER = ("tokenizer.json", "tokenizer_source.json")
PICTURES = 8
_OF_A_STEP = re.compile(r"(.+)_(\d{8})\.png")


def export_weights(
    workdir: epath.PathLike,
    out: epath.PathLike,
    *,
    kept: Kept = "ema",
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    licence: Licence | None = None,
    title: str = "",
) -> Manifest:
    """Writes the weights of a trained run as a folder that needs no workdir, whole or not at all.

    Args:
        workdir: of the run, or a folder of weights.
        out: local folder; there must be none yet, or an empty one.
        kept: "ema" for the averaged weights, where a player keeps an average; "trained" for the weights themselves.
        step: which checkpoint; the newest by default.
        shard_bytes: greatest size of a file of parameters.
        licence: of the weights, for the model card.
        title: of the model card; by default the name of the folder.

    Raises:
        ConfigError: there is no run or no checkpoint, `out` is not empty, or a run that its inputs name is not there.
    """
    if kept not in get_args(Kept):
        raise ConfigError(f"kept is {kept!r}; choose 'ema' or 'trained'")
    if shard_bytes < 1:
        raise ConfigError(f"the greatest size of a file is {shard_bytes} bytes; give 1 or more")
    name = title or pathlib.Path(out).absolute().name
    workdir = epath.Path(workdir)
    runs = named_runs(load_config(workdir))
    with new_folder(out) as folder:
        try:
            for where, place in dict(runs.values()).items():
                inner = folder / place
                inner.mkdir(parents=True)
                _write(inner, where, {}, "ema", None, shard_bytes, licence or Licence(), place.rpartition("/")[2])
            places = {field: place for field, (_, place) in runs.items()}
            return _write(folder, workdir, places, kept, step, shard_bytes, licence or Licence(), name)
        except WeightsError as error:
            raise ConfigError(str(error)) from error


def named_runs(config: Config) -> dict[str, tuple[epath.Path, str]]:
    """`{key of the config: (run, "runs/NAME")}` of the runs that the inputs read frozen networks from.

    A folder of published weights is not one: it has terms of its own, and stays where it is.

    Raises:
        ConfigError: a key names a folder that is not there.
    """
    found: dict[str, tuple[epath.Path, str]] = {}
    places: dict[str, str] = {}
    for field, value in _workdirs(dict(config).get("inputs", {}), "inputs"):
        where = epath.Path(value)
        if not (where / "config.json").exists():
            raise ConfigError(
                f"{field} names {value!r}, which is no run and no folder of weights; set it to where it is"
            )
        if is_published(where):
            continue
        place = places.setdefault(str(where), f"runs/{_plain(where.name)}{_number(where, places)}")
        found[field] = where, place
    return found


def _number(where: epath.Path, places: Mapping[str, str]) -> str:
    """What tells the folder of a run from those of others that have its name."""
    count = sum(_plain(epath.Path(other).name) == _plain(where.name) for other in places)
    return f"_{count + 1}" if count else ""


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_") or "run"


def _workdirs(section: Any, path: str) -> Iterator[tuple[str, str]]:
    """The fields of a section, and of those below, that name a workdir: `("inputs.codec.workdir", value)`."""
    for name, value in section.items():
        if hasattr(value, "items"):
            yield from _workdirs(value, f"{path}.{name}")
        elif name.endswith("workdir") and value:
            yield f"{path}.{name}", value


def _write(
    folder: pathlib.Path,
    workdir: epath.Path,
    runs: Mapping[str, str],
    kept: Kept,
    step: int | None,
    shard_bytes: int,
    licence: Licence,
    title: str,
) -> Manifest:
    """Fills an empty folder."""
    config = from_json((workdir / "config.json").read_text(), workdir)
    recipe = resolve(load_config(workdir), name=str(workdir)).build(cast(Any, jax.default_backend()))
    step, weights = _read(workdir, recipe, kept, step)
    manifest = Manifest(step, kept, runs)
    write_safetensors(folder, MODEL, parameters(weights), shard_bytes)
    (folder / "config.json").write_text(to_json(config))
    (folder / MANIFEST).write_text(manifest.text())
    for name in TOKENIZER:
        if (workdir / name).exists():
            (folder / name).write_bytes((workdir / name).read_bytes())
    tokenizer = folder / TOKENIZER[0]
    text = tokenizer.read_text() if tokenizer.exists() else None
    counterparts = write_counterparts(folder, recipe.config, weights, shard_bytes, text)
    pictures = _copy_pictures(workdir, folder, step)
    counts = {
        f"{player}/{role}": sum(leaf.size for leaf in flatten(tree).values())
        for player, roles in weights.items()
        for role, tree in roles.items()
    }
    facts = Facts.of(workdir, config.to_dict(), manifest, counts, counterparts, pictures, draws=_draws(recipe))
    (folder / "README.md").write_text(model_card(title, facts, licence), encoding="utf-8")
    return manifest


def _read(workdir: epath.Path, recipe: Recipe, kept: Kept, step: int | None) -> tuple[int, Tree]:
    """The step, and `{player: weights}`."""
    if is_weights_folder(workdir):
        manifest = read_manifest(workdir)
        if manifest.kept != kept:
            raise ConfigError(
                f"{workdir} holds the weights {manifest.kept!r} alone; ask for those, or name the workdir"
            )
        return manifest.step, load_weights(workdir, recipe, step)
    if step is None:
        step = max(complete_steps(workdir), default=None)
    if kept == "ema" or step is None:
        weights = load_weights(workdir, recipe, step)  # which says so where there is no checkpoint
        assert step is not None
        return step, weights
    abstract = jax.eval_shape(recipe.init, key(0, 0, "init"))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), abstract)
    checkpointer = Checkpointer(workdir)
    try:
        state, _ = checkpointer.restore(placed, step)
    finally:
        checkpointer.close()
    return step, {name: player.params for name, player in state.players.items()}


def _draws(recipe: Recipe) -> bool:
    """Whether the run makes pictures of prompts."""
    return bool(recipe.tokenizers()) and hasattr(recipe.options, "guidance")


def _copy_pictures(workdir: epath.Path, folder: pathlib.Path, step: int) -> list[str]:
    """Copies the newest picture of each title to `samples/`; returns the names."""
    samples = workdir / "samples"
    newest: dict[str, tuple[int, epath.Path]] = {}
    for path in sorted(samples.glob("*.png"), key=lambda p: p.name) if samples.exists() else []:
        match = _OF_A_STEP.fullmatch(path.name)
        title, made = (match[1], int(match[2])) if match else (path.stem, step)
        if made <= step and made >= newest.get(title, (-1, path))[0]:
            newest[title] = made, path
    chosen = [path for _, path in newest.values()][:PICTURES]
    for path in chosen:
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / path.name).write_bytes(path.read_bytes())
    return [path.name for path in chosen]
