"""What every oracle does to the files that its library saved."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any

import torch


def drop_versions(path: pathlib.Path) -> None:
    """Takes library versions out of a `config.json`, so that another version writes the same file."""
    values = json.loads(path.read_text())
    kept = {key: value for key, value in values.items() if not key.endswith("_version")}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def save_shapes(folder: pathlib.Path, name: str, module: Any) -> None:
    """Writes the names and shapes of a module's tensors, made on the meta device: `tests.parity.published_shapes`."""
    shapes = {tensor: list(value.shape) for tensor, value in module.state_dict().items()}
    (folder / "shapes").mkdir(exist_ok=True)
    text = json.dumps(shapes, separators=(",", ":")).encode()
    (folder / "shapes" / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))


def save_parts(folder: pathlib.Path, parts: dict[str, Any]) -> None:
    """Saves the networks of a pipeline in bfloat16, each in a folder of its own, and leaves them in float32."""
    for name, model in parts.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
        drop_versions(folder / name / "config.json")
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        model.to(torch.float32)
