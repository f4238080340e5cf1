"""What manifest.json says: the units as a client sees them, the files, and the versions that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from snapgen_jax.export.flatbuffer import Description, Tensor
from snapgen_jax.export.sampler import Unit

LAYOUTS = {1: "N", 2: "NC", 3: "NLD", 4: "NHWC"}  # by rank
LIBRARIES = (
    "snapgen-jax",
    "jax",
    "flax",
    "tensorflow-cpu",
    "tensorflow",
    "litert-converter",
    "ai-edge-litert",
    "ai-edge-quantizer",
)
# The oldest versions that a bundle's files are known to run on: of the Python package, of the Maven artefacts
# com.google.ai.edge.litert:litert and :litert-gpu, and of the npm package @litertjs/core.
MINIMUM_RUNTIME = {"ai-edge-litert": "2.3.0", "android": "2.3.0", "litert.js": "2.5.3"}


@dataclasses.dataclass(frozen=True)
class About:
    """Whose a bundle is.

    Attributes:
        model: the name that an app shows.
        licence: of the weights, an identifier such as "apache-2.0"; "" where none was chosen.
        provenance: what made the weights, as plain JSON: "config_sha256" of the run's config.json, and "commit"; of a
            program that was fitted to them, what fitted it.
    """

    model: str = ""
    licence: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Its part of manifest.json."""
        return {**dataclasses.asdict(self), "minimum_runtime": MINIMUM_RUNTIME}


class Ranges:
    """The smallest and largest value of each input and output of each unit, as they pass by."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], list[float]] = {}

    def watch(self, unit_name: str, unit: Unit) -> Unit:
        """The same function, which also notes what goes in and out."""

        def run(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            outputs = unit(**inputs)
            for name, array in {**inputs, **outputs}.items():
                low, high = self._seen.get((unit_name, name), [np.inf, -np.inf])
                self._seen[unit_name, name] = [min(low, float(array.min())), max(high, float(array.max()))]
            return outputs

        return run

    def of(self, unit_name: str, name: str) -> list[float]:
        """[smallest, largest]."""
        return self._seen[unit_name, name]


def describe_unit(name: str, signature: str, description: Description, ranges: Ranges) -> dict[str, Any]:
    """The signature of a unit: its named tensors with shape, dtype, layout and the range that they were seen in,
    and the order in which the file itself has them."""

    def tensors(found: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            tensor_name: {
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "layout": LAYOUTS.get(len(tensor.shape), ""),
                "range": ranges.of(name, tensor_name),
            }
            for tensor_name, tensor in sorted(found.items())
        }

    return {
        "signature": signature,
        "inputs": tensors(description.inputs[signature]),
        "outputs": tensors(description.outputs[signature]),
        "input_order": list(description.inputs[signature]),
        "output_order": list(description.outputs[signature]),
        "max_rank": description.max_rank,
    }


def fingerprints(folder: pathlib.Path) -> dict[str, Any]:
    """{name: {"bytes", "sha256"}} of every file under a folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def versions() -> dict[str, str]:
    """Of Python and of the libraries that took part, where they are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: pathlib.Path, data: Any) -> None:
    """Indented, without NaN or infinity, which JSON does not know."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "utf-8")
