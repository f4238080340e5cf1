"""What every oracle does to the files that its library saved."""

from __future__ import annotations

import json
import pathlib


def drop_versions(path: pathlib.Path) -> None:
    """Takes library versions out of a `config.json`, so that another version writes the same file."""
    values = json.loads(path.read_text())
    kept = {key: value for key, value in values.items() if not key.endswith("_version")}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
