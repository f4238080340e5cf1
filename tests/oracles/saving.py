"""What every oracle does to the files that its library saved."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any


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
