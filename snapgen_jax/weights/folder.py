"""The weights of a run as a folder that needs no workdir: what `snapgen weights export` writes, and how it is read.

    DIR/weights.json      what the folder is: the step, which weights, and the runs beside them
        config.json       the run's config
        model.safetensors its parameters; in shards with `model.safetensors.index.json` where they are many
        tokenizer.json    the run's own, if it has one
        runs/NAME/        the same of each run that its inputs read frozen networks from

A tensor is called by its path, `model.unet.conv_in.kernel`: player, role, and the keys of the parameter. Whatever takes
the workdir of a trained run takes such a folder too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from snapgen_jax.networks.module import flatten
from snapgen_jax.weights.checkpoint import FLOATS, Tensor, WeightsError, read_folder
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import WeightMap, one
from snapgen_jax.weights.published import read_json

Tree = Any
Path = tuple[str, ...]
Kept = Literal["ema", "trained"]

MANIFEST = "weights.json"
FORMAT = 1
MODEL = "model"  # stem of the files with the parameters
SHARD_BYTES = 5 * 10**9
_NAMES = {np.dtype("float32"): "F32", np.dtype("float16"): "F16", np.dtype(jax.numpy.bfloat16): "BF16"}
_RUN = re.compile(r"runs/[A-Za-z0-9_-]+")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `weights.json` says.

    Attributes:
        step: updates that the weights have had.
        kept: "ema" for the averaged weights, those of a player without an average as they are; "trained" for the
            weights themselves.
        runs: `{key of config.json: folder}` of runs whose frozen networks travel along, "runs/NAME" each.
    """

    step: int
    kept: Kept
    runs: Mapping[str, str]

    def text(self) -> str:
        """The contents of the file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"


def is_weights_folder(folder: epath.PathLike) -> bool:
    """Whether a folder is one that `snapgen weights export` wrote."""
    return (epath.Path(folder) / MANIFEST).exists()


def read_manifest(folder: epath.PathLike) -> Manifest:
    """What a folder of weights says of itself.

    Raises:
        WeightsError: the file is damaged, a later version wrote it, or it names a folder outside of this one.
    """
    file = epath.Path(folder) / MANIFEST
    values = read_json(file)
    if values.get("format") != FORMAT:
        raise WeightsError(
            f"{file} has format {values.get('format')!r}, and this version reads {FORMAT}; install the version of "
            "snapgen-jax that wrote it"
        )
    step, kept, runs = values.get("step"), values.get("kept"), values.get("runs")
    if not isinstance(step, int) or kept not in ("ema", "trained") or not isinstance(runs, dict):
        raise WeightsError(f"{file} is damaged: it says no step, no kind of weights or no runs; fetch it again")
    for key, place in runs.items():
        if not isinstance(place, str) or not _RUN.fullmatch(place):
            raise WeightsError(f"{file} names the run {place!r} for {key}; a run lies in 'runs/NAME' of the folder")
    return Manifest(step, kept, runs)


def runs_of(folder: epath.PathLike) -> dict[str, str]:
    """`{key of config.json: path}` of the runs that lie inside of a folder of weights.

    Raises:
        WeightsError: as for `read_manifest`.
    """
    return {key: str(epath.Path(folder) / place) for key, place in read_manifest(folder).runs.items()}


def tensor_name(path: Path) -> str:
    """The name of the tensor of a parameter."""
    return ".".join(path)


def held(folder: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of a folder of weights, from the headers of its files.

    Raises:
        WeightsError: the folder is not local, or is damaged.
    """
    return read_folder(str(folder))


def read_weights(folder: epath.PathLike, spec: Tree, places: Tree) -> Tree:
    """Some of the parameters in a folder of weights, each in the dtype that is asked for.

    Args:
        folder: local.
        spec: `{player: tree of ShapeDtypeStruct}`: which ones.
        places: a tree like `spec` of shardings, or one sharding for all.

    Raises:
        WeightsError: the folder is damaged, or does not hold such parameters; nothing has been read then.
    """
    rules = tuple(one("/".join(path), tensor_name(path)) for path in flatten(spec))
    return load(str(folder), WeightMap(rules, ignored=(".*",)), spec, places, dtype=None)


def parameters(weights: Tree) -> dict[str, Any]:
    """`{name of the tensor: array}` of `{player: tree}`.

    Raises:
        WeightsError: a parameter is no float of 16 or 32 bits, or two have one name.
    """
    flat = flatten(weights)
    named = {tensor_name(path): array for path, array in flat.items()}
    wrong = [name for name, array in named.items() if np.dtype(array.dtype) not in _NAMES]
    if wrong or len(named) < len(flat):
        problem = f"{', '.join(wrong)} is none of {', '.join(FLOATS)}" if wrong else "two parameters have one name"
        raise WeightsError(f"these weights cannot be stored as safetensors: {problem}")
    return named


def write_safetensors(
    folder: pathlib.Path, stem: str, tensors: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors as `stem.safetensors`, or in shards with an index, as the Hugging Face hub has them.

    Args:
        folder: an existing local folder.
        stem: beginning of the names.
        tensors: arrays by name; those of one shard are on the host at a time.
        shard_bytes: a file holds no more, unless a single tensor does.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, array in tensors.items():
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else [f"{stem}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        # Safetensors writes the bytes as they lie, whatever the strides say.
        arrays = {name: np.asarray(jax.device_get(tensors[name]), order="C") for name in names}
        save_file(arrays, folder / file, metadata={"format": "pt"})  # transformers asks for "pt"
    if len(files) > 1:
        total = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in tensors.values())
        listed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
