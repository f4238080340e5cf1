"""Where every array of a state lies: rules over parameter paths, followed by optimizer state and averages."""

from __future__ import annotations

import math
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
        kept, parts = [], 1
        for name in (axes,) if isinstance(axes, str) else axes or ():
            if size % (parts * mesh.shape[name]) == 0:
                kept.append(name)
                parts *= mesh.shape[name]
        return tuple(kept) if len(kept) > 1 else kept[0] if kept else None

    return PartitionSpec(*(keep(axes, size) for axes, size in zip(spec, shape, strict=False)))


def explain(tree: Tree) -> str:
    """A table of every array: path, shape, dtype, placement, bytes on one device; and the totals."""
    rows = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        spec = getattr(leaf.sharding, "spec", "one device")
        rows.append((path_name(path), str(tuple(leaf.shape)), str(leaf.dtype), str(spec), f"{_local_bytes(leaf):,}"))
    return f"{_table(('path', 'shape', 'dtype', 'placement', 'bytes/device'), rows)}\n{_total(tree)}"


def summarize(tree: Tree, depth: int) -> str:
    """The table of `explain` with one row for all arrays that share the first `depth` parts of their path."""
    groups: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        groups.setdefault(path_name(path[:depth]), []).append(leaf)
    rows = [
        (name, f"{len(x)}", f"{sum(leaf.size for leaf in x):,}", f"{sum(map(_local_bytes, x)):,}")
        for name, x in groups.items()
    ]
    return f"{_table(('part', 'arrays', 'numbers', 'bytes/device'), rows)}\n{_total(tree)}"


def _local_bytes(leaf: jax.Array) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def _total(tree: Tree) -> str:
    leaves = jax.tree.leaves(tree)
    whole = sum(leaf.dtype.itemsize * leaf.size for leaf in leaves)
    return f"{len(leaves)} arrays, {whole:,} bytes in all, {sum(map(_local_bytes, leaves)):,} bytes on each device"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join(lines)
