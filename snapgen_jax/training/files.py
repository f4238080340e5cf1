"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath


def on_object_store(path: epath.PathLike) -> bool:
    """Whether a path is an object's ("gs://...") rather than a file's."""
    return "://" in str(path)


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, so that no reader, and no crash, ever sees a part of it."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if on_object_store(path):  # an object is there when all of it is, and renaming one would copy it
        path.write_bytes(data)
        return
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[pathlib.Path]:
    """Yields a local file to fill, which takes its place at the end of the `with`, and is gone if that raises."""
    # Beside its place, so that it is renamed; below the system's temporary folder where it is copied to a store.
    remote = on_object_store(path)
    if not remote:
        path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=None if remote else str(path.parent)) as temporary:
        local = pathlib.Path(temporary) / path.name
        yield local
        if remote:
            epath.Path(local).copy(path, overwrite=True)
        else:
            local.replace(str(path))
