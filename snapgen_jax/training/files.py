"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath

from snapgen_jax.training.exits import ConfigError


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


@contextlib.contextmanager
def new_folder(out: epath.PathLike) -> Iterator[pathlib.Path]:
    """A folder to fill, which appears at `out` when all went well, and not at all otherwise.

    Raises:
        ConfigError: `out` is in an object store, is a file, or is a folder that is not empty.
    """
    if on_object_store(out):
        raise ConfigError(f"{out} is no local folder; name a local one, and copy it when it is made")
    target = pathlib.Path(out).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{out} is there already and is no empty folder; name a new one, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial.", dir=target.parent) as scratch:
        made = pathlib.Path(scratch) / "new"
        made.mkdir()
        yield made
        made.rename(target)  # onto an empty folder too
