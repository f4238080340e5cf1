"""Weights that take few values: held to those values, and listed in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from snapgen_jax.training.exports import ExportUnit, Stored

TOLERANCE = 1e-6  # relative; a float32 product of a scale and an integer


def describe_storage(
    unit: ExportUnit, weights: Mapping[str, Any], storage: Mapping[str, Stored] | None = None
) -> dict[str, Any]:
    """Checks what a unit stores as few values against its weights.

    Args:
        unit: of an export plan.
        weights: `{role: parameters}`.
        storage: `unit.stored(weights)`, where that is known.

    Returns:
        {path: {"bits", "shape", "scale_shape", "levels"}} for the manifest; `levels` counts the integers in use.

    Raises:
        ValueError: a path is no parameter, or its integers and scale do not give that parameter; names the path.
    """
    found = unit.stored(weights) if storage is None else storage
    return {path: _describe(unit, path, stored, _leaf(unit, path, weights)) for path, stored in found.items()}


def _leaf(unit: ExportUnit, path: str, weights: Mapping[str, Any]) -> np.ndarray:
    for role in unit.roles:
        if not path.startswith(f"{role}/"):
            continue
        node = weights[role]
        for key in path.removeprefix(f"{role}/").split("/"):
            node = node[key] if isinstance(node, Mapping) and key in node else None
        if node is not None and not isinstance(node, Mapping):
            return np.asarray(node, np.float32)
    raise ValueError(f"{unit.name}: storage names {path!r}, which is no parameter of its roles {', '.join(unit.roles)}")


def _describe(unit: ExportUnit, path: str, stored: Stored, weight: np.ndarray) -> dict[str, Any]:
    integers, scale = np.asarray(stored.integers), np.asarray(stored.scale, np.float32)
    bound = 2 ** (stored.bits - 1)
    if not np.issubdtype(integers.dtype, np.integer) or integers.shape != weight.shape:
        found = f"{integers.dtype} {integers.shape}"
        raise ValueError(f"{unit.name}: storage of {path!r} is {found}; integers {weight.shape} were expected")
    sizes = zip(scale.shape[::-1], weight.shape[::-1], strict=False)
    if scale.ndim > weight.ndim or any(n not in (1, m) for n, m in sizes):
        raise ValueError(f"{unit.name}: the scale {scale.shape} of {path!r} does not broadcast to {weight.shape}")
    if integers.size and max(-integers.min(), integers.max()) > bound:
        raise ValueError(
            f"{unit.name}: the integers of {path!r} leave -{bound}..{bound}, the range of {stored.bits} bits"
        )
    if not np.allclose(integers * scale, weight, rtol=TOLERANCE, atol=0):
        raise ValueError(f"{unit.name}: scale times integers of {path!r} is not the weight that is exported")
    return {
        "bits": stored.bits,
        "shape": list(weight.shape),
        "scale_shape": list(scale.shape),
        "levels": int(np.unique(integers).size),
    }
