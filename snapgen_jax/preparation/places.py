"""Bytes where they lie: so that those of images need not travel when examples are sorted."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.training.files import on_object_store


class Place(NamedTuple):
    """A range of a file.

    Attributes:
        file: its path.
        offset: of the first byte.
        length: in bytes.
    """

    file: str
    offset: int
    length: int


class PlaceReader:
    """Reads places; keeps the last file open, since places are often asked for in its order."""

    def __init__(self) -> None:
        self._name, self._file = "", contextlib.ExitStack()
        self._stream = None

    def read(self, place: Place) -> bytes:
        """The bytes.

        Raises:
            DataError: the file is gone, or shorter than it was.
        """
        try:
            if place.file != self._name:
                self.close()
                self._stream = self._file.enter_context(epath.Path(place.file).open("rb"))
                self._name = place.file
            assert self._stream is not None
            self._stream.seek(place.offset)
            found = self._stream.read(place.length)
        except OSError as error:
            raise DataError(f"{place.file} cannot be read again: {error}; start again when it can") from error
        if len(found) != place.length:
            raise DataError(f"{place.file} is shorter than it was; start again when nothing writes to it")
        return found

    def close(self) -> None:
        """Closes the file that is open."""
        self._file.close()
        self._name, self._stream = "", None


@contextlib.contextmanager
def spool(path: epath.Path) -> Iterator[Callable[[bytes], Place]]:
    """A file for bytes that have no place of their own. It is there when the block has ended well, and not before.

    Yields:
        A function that keeps some bytes, and says where they will be. It raises `DataError` where the disk is full.
    """
    end = 0
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            prefix=".writing-", dir=None if on_object_store(path) else str(path.parent), ignore_cleanup_errors=True
        )
    with folder as temporary:
        local = pathlib.Path(temporary) / path.name
        with local.open("wb", buffering=0) as stream:

            def add(data: bytes) -> Place:
                nonlocal end
                with writing(path):
                    if stream.write(data) != len(data):
                        raise OSError("the disk took a part of it")
                place, end = Place(str(path), end, len(data)), end + len(data)
                return place

            yield add
        if not end:
            return
        with writing(path):
            if on_object_store(path):
                epath.Path(local).copy(path, overwrite=True)
            else:
                local.replace(str(path))


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Within it, a disk that is full or refuses is a `DataError` that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}; make room, then start again, which goes on") from error
