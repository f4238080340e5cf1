"""What a source of images is: units of work, each of which is read from its beginning to its end."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.places import Place

Caption = tuple[str, float]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source that one worker reads: a tar, a row group, a thousand rows.

    Attributes:
        name: unique in the source, and the same in every run.
        state: changes when its content does, such as size and time of its file.
        work: what the source needs to find it.
    """

    name: str
    state: str
    work: Any


@dataclasses.dataclass(frozen=True)
class RawExample:
    """An example as its source has it.

    Attributes:
        id: unique in the source.
        image: the bytes of its file; None where they cannot be read, and `problem` says why.
        captions: with their weights, relative to each other.
        columns: the numbers and texts that were asked for; None for a missing one.
        place: where the bytes lie as they are; None where only reading the unit gives them.
        problem: why there is no image.
    """

    id: str
    image: bytes | None
    captions: tuple[Caption, ...]
    columns: Mapping[str, float | str | None] = dataclasses.field(default_factory=dict)
    place: Place | None = None
    problem: str = ""


class ImageSource(Protocol):
    """Can be pickled: it travels to the workers."""

    def units(self) -> Sequence[Unit]:
        """All of the source, in order."""
        ...

    def read(self, unit: Unit) -> Iterator[RawExample]:
        """The examples of a unit, always in the same order.

        Raises:
            DataError: it is damaged, or a column holds what it should not.
        """
        ...


_SOURCES = {
    "folder": "snapgen_jax.preparation.sources.folder",
    "tar": "snapgen_jax.preparation.sources.tar",
    "parquet": "snapgen_jax.preparation.sources.tables",
    "huggingface": "snapgen_jax.preparation.sources.tables",
    "tfds": "snapgen_jax.preparation.sources.tfds",
    "shards": "snapgen_jax.preparation.sources.shards",
}


def build_source(config: CollectConfig) -> ImageSource:
    """The source that a config names, looked at: its columns are there.

    Raises:
        DataError: it is missing, empty, or lacks a column; says which columns there are.
    """
    if not config.path and config.source != "tfds":
        raise DataError(f"the source {config.source!r} needs path, where its images are; give --path=...")
    return importlib.import_module(_SOURCES[config.source]).build(config)


def weighted(texts: Mapping[str, Iterable[str]], weights: Mapping[str, float]) -> tuple[Caption, ...]:
    """Captions with weights: each column's weight is shared among the texts that it holds.

    Args:
        texts: by column, each text on one line or empty; empty ones are left out.
        weights: by column; 1 for those not named.
    """
    found: list[Caption] = []
    for column, values in texts.items():
        kept = [text for text in values if text]
        found += [(text, weights.get(column, 1.0) / len(kept)) for text in kept]
    return tuple(found)


def texts_of(value: Any, where: str) -> list[str]:
    """The captions that a value holds: one, several, or none; each on one line.

    Raises:
        DataError: it is neither text nor a list of texts.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or isinstance(value, str):
        return [" ".join(_whole(value or "").split())]
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return [text for item in value for text in texts_of(item, where)]
    raise DataError(f"{where}: a caption is {value!r:.80}; expected text, or a list of texts; name another column")


def columns_of(row: Mapping[str, Any], config: CollectConfig, where: str) -> dict[str, float | str | None]:
    """The numbers and texts of a row that a config asks for.

    Raises:
        DataError: a column that is asked for as a number holds something else.
    """
    numbers = {name: _number(row.get(name), f"{where}: the column {name!r}") for name in config.all_numbers()}
    return {**numbers, **{name: _text(row.get(name)) for name in config.texts}}


def _number(value: Any, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{where} is not numeric: {value!r:.80}; bound another column, or ask for it in texts"
        ) from None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else _whole(str(value))


def _whole(text: str) -> str:
    """The text with "?" for each half of a character, which JSON may hold and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode()


def refuse_missing(asked: Iterable[str], known: Iterable[str], what: str, where: str) -> None:
    """Raises `DataError` for the first column that is asked for and not there; names those that are."""
    known = list(known)
    for column in asked:
        if column not in known:
            raise DataError(f"{where} has no {what} {column!r}; its columns are {', '.join(map(str, known)) or 'none'}")


def files_of(path: str, suffixes: Sequence[str], what: str) -> list[tuple[str, epath.Path]]:
    """(name, file) of a file, of the files with these suffixes in a folder, or of a pattern; sorted by name.

    Names are relative to the folder, or to the last folder of the pattern that is named in full.

    Raises:
        DataError: there is none.
    """
    given = epath.Path(path).expanduser()
    root, found = given, [given]
    if given.is_dir():
        found = [file for suffix in suffixes for file in given.glob(f"*{suffix}")]
    elif given.exists():
        root = given.parent
    else:
        while any(sign in str(root) for sign in "*?["):
            root = root.parent
        found = list(root.glob(str(given.relative_to(root)))) if root != given and root.exists() else []
    named = sorted({(str(file.relative_to(root)), file) for file in found if not file.name.startswith(".")})
    if not named:
        raise DataError(f"{path} holds no {what} ({', '.join(suffixes)}); give a file, a folder, or a pattern")
    return named


def state_of(file: epath.Path) -> str:
    """Size and time of change of a file."""
    found = file.stat()
    return f"{found.length} {found.mtime}"
