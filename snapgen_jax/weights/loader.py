"""Loads a published checkpoint straight onto the devices, slice by slice.

A host reads only what its devices hold, and holds one shard of one parameter at a time: its memory is bounded by the
largest shard, whatever the size of the checkpoint.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from snapgen_jax.networks.module import flatten, unflatten
from snapgen_jax.weights.checkpoint import FLOATS, Reader, Tensor, WeightsError, read_folder
from snapgen_jax.weights.mapping import PERMUTATIONS, Rule, Shape, WeightMap, reference_shape, reference_shapes
from snapgen_jax.weights.sources import Source

Tree = Any
Ranges = tuple[tuple[int, int], ...]


def load(
    folder: str | pathlib.Path,
    weight_map: WeightMap,
    spec: Tree,
    shardings: Tree,
    *,
    dtype: DTypeLike | None = jnp.bfloat16,
    source: Source | None = None,
) -> Tree:
    """Loads the weights in a folder as the parameters of a network.

    Args:
        folder: local folder of safetensors files in the Hugging Face layout, with or without an index.
        weight_map: which tensors make which parameter.
        spec: the network's parameters, nested dict of `ShapeDtypeStruct`, as `networks.module.build` gives it.
        shardings: where each parameter goes: a tree like `spec` of `jax.sharding.Sharding`, as
            `parallel.sharding.tree_shardings` makes it from path rules, or one sharding for all.
        dtype: of the loaded parameters, whatever the file's; None for those of `spec`.
        source: where the weights are published; quoted by the errors.

    Returns:
        a tree like `spec` of global arrays.

    Raises:
        WeightsError: before any tensor is read, naming every tensor that is missing, surplus, or of another shape or
            dtype than the network's.
    """
    flat = flatten(spec)
    places = dict.fromkeys(flat, shardings) if isinstance(shardings, Sharding) else flatten(shardings)
    tensors = read_folder(folder, source=source)
    try:
        names = match(tensors, weight_map, reference_shapes(weight_map, spec))
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}" + (f"\n{source.advice}" if source else "")) from None
    rules = {tuple(rule.path.split("/")): rule for rule in weight_map.rules}
    parameters = {}
    with Reader(tensors) as reader:
        for path, leaf in flat.items():
            kind = np.dtype(leaf.dtype if dtype is None else dtype)
            parameters[path] = _load_parameter(reader, names, rules[path], tuple(leaf.shape), places[path], kind)
    return unflatten(parameters)


def match(tensors: Mapping[str, Tensor], weight_map: WeightMap, expected: Mapping[str, Shape]) -> dict[str, str]:
    """Finds the tensors that a network expects in a checkpoint: {expected name: name in the checkpoint}.

    Raises:
        WeightsError: names every tensor that is missing, surplus, or of another shape or dtype.
    """
    prefix = max(weight_map.prefixes, key=lambda prefix: sum(prefix + name in tensors for name in expected))
    given = {name.removeprefix(prefix): name for name in tensors}
    tied = collections.defaultdict(list)
    for alias, name in weight_map.aliases:
        tied[name].append(alias)

    names: dict[str, str] = {}
    used: set[str] = set()
    problems: dict[str, list[str]] = {"missing": [], "surplus": [], "misshapen": [], "dtype": []}
    for name, shape in expected.items():
        found = [candidate for candidate in (name, *tied[name]) if candidate in given]
        if not found:
            problems["missing"].append(f"{name} {list(shape)}")
            continue
        names[name] = given[found[0]]
        used.update(found)
        for tensor in (tensors[given[candidate]] for candidate in found):
            if tensor.shape != shape:
                problems["misshapen"].append(f"{name} is {list(tensor.shape)}; the network has {list(shape)}")
            elif tensor.dtype not in FLOATS:
                problems["dtype"].append(f"{name} is {tensor.dtype}; expected one of {', '.join(FLOATS)}")
    for name in given:
        if name not in used and not weight_map.is_ignored(name):
            problems["surplus"].append(f"{name} {list(tensors[given[name]].shape)}")
    if any(problems.values()):
        summary = ", ".join(f"{len(lines)} {kind}" for kind, lines in problems.items() if lines)
        lines = [f"  {kind}: {line}" for kind, lines in problems.items() for line in lines]
        raise WeightsError(
            f"the tensors are not those of the network ({summary}). Give the folder of this very network, or the "
            "config that its weights were made with.\n" + "\n".join(lines)
        )
    return names


def _load_parameter(
    reader: Reader, names: Mapping[str, str], rule: Rule, shape: Shape, sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    """One parameter as a global array. Of the host's shards only one is in its memory at a time, which is why this is
    not `jax.make_array_from_callback`: that calls for all of them before it moves the first."""
    devices = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices[_ranges(index or (), shape)].append(device)
    index, parts = rule.part
    start = reference_shape(rule, shape)[0] // parts * index if parts > 1 else 0
    shards = []
    for ranges, holders in devices.items():
        block = _read_block(reader, names, rule, ranges, start, dtype)
        copies = [jax.device_put(block, device) for device in holders]
        shards += jax.block_until_ready(copies)  # a copy to an accelerator returns before it ends
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _ranges(index: Iterable[slice], shape: Shape) -> Ranges:
    """The slices of a shard as (start, stop) of every axis."""
    starts_stops = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    return (*starts_stops, *((0, size) for size in shape[len(starts_stops) :]))


def _read_block(
    reader: Reader, names: Mapping[str, str], rule: Rule, ranges: Ranges, start: int, dtype: np.dtype
) -> np.ndarray:
    """The block of our parameter that lies at `ranges`, read from just those slices of the tensors that make it. The
    parameter begins at `start` of their first axis."""
    block = np.empty([stop - start for start, stop in ranges], dtype)
    items, inner = (rule.names[slice(*ranges[0])], ranges[1:]) if rule.stack else (rule.names, ranges)
    targets = block if rule.stack else block[None]
    permutation = PERMUTATIONS[rule.transform] or tuple(range(len(inner)))
    index = [slice(*inner[permutation.index(axis)]) for axis in range(len(inner))]
    if start:
        index[0] = slice(start + index[0].start, start + index[0].stop)
    for i, name in enumerate(items):
        _copy(targets[i, ...], reader.read(names[name], tuple(index)).astype(dtype, copy=False).transpose(permutation))
    return block


def _copy(target: np.ndarray, part: np.ndarray) -> None:
    """`target[...] = part`. A transposed part is copied sixteen columns at a time, which keeps its rows in the cache
    (measured for [10240, 4096]: eight times as fast)."""
    bits = np.dtype(f"u{target.dtype.itemsize}")  # numpy copies its own dtypes faster than bfloat16
    target, part = target.view(bits), part.view(bits)
    if part.flags.c_contiguous:
        target[...] = part
        return
    for column in range(0, target.shape[-1], 16):
        target[..., column : column + 16] = part[..., column : column + 16]
