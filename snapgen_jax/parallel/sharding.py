"""Where every array of a state lies: rules over parameter paths, followed by optimizer state and averages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any
Rules = Sequence[tuple[str, PartitionSpec]]


def path_name(path: Any) -> str:
    """A tree path as "players/model/params/unet/conv_in/kernel"."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


def tree_shardings(tree: Tree, rules: Rules, mesh: Mesh) -> Tree:
    """A `NamedSharding` for every leaf of a tree of arrays or `ShapeDtypeStruct`.

    The first rule whose pattern is found in a leaf's path decides; a leaf without a rule is replicated. The path of an
    optimizer moment or an average ends with that of its parameter, so it follows it. An axis that does not divide its
    dimension is left out there.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name) and len(spec) <= len(leaf.shape):
                return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    def keep(axes: Any, size: int) -> Any:
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        return axes if names and size % parts == 0 else None

    return PartitionSpec(*(keep(axes, size) for axes, size in zip(spec, shape, strict=False)))


def explain(tree: Tree) -> str:
    """A table of every array: path, shape, dtype, placement, bytes on one device; and the totals."""
    rows, total, local = [], 0, 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        sharding = leaf.sharding
        shard = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        size = leaf.dtype.itemsize
        here = size * _product(shard)
        total, local = total + size * _product(leaf.shape), local + here
        spec = getattr(sharding, "spec", "one device")
        rows.append((path_name(path), str(tuple(leaf.shape)), str(leaf.dtype), str(spec), f"{here:,}"))
    header = ("path", "shape", "dtype", "placement", "bytes/device")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([*lines, f"{len(rows)} arrays, {total:,} bytes in all, {local:,} bytes on each device"])


def _product(shape: Sequence[int]) -> int:
    out = 1
    for size in shape:
        out *= int(size)
    return out
