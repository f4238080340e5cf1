"""Files that are whole or not there."""

from __future__ import annotations

from etils import epath


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a text file so that no reader, and no crash, ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
