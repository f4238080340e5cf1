"""A person's own images with captions.

The captions are found in the conventions of the ecosystem, at any depth below the folder:

* `metadata.jsonl` or `metadata.csv` (the "imagefolder" convention): rows with `file_name`, relative to the metadata
  file, and `text` or `caption`; in a `.jsonl` file the caption may be a list of several, of which each draw takes one.
* where no metadata file exists: `name.txt` beside `name.jpg`, holding the caption.

With `captions="none"` in the config every image counts, and none has a caption.

One file is one example, whatever number of rows or links name it: each draw takes one of all its captions. Links to
files and folders are followed, since a snapshot of a hub is links into its cache. A file or folder whose name begins
with a dot is not data, nor is what other programs leave beside images.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from snapgen_jax.data.arrays import IMAGE, TEXT, ArraySpec, Example
from snapgen_jax.data.config import SourceConfig, Split
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.images import EXTENSIONS, decode, header_size
from snapgen_jax.data.sources import asked, hold_out, holds_out
from snapgen_jax.data.words import pick, require_text

_METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption")
_NOT_DATA = frozenset({"__MACOSX", "@eaDir"})  # beside every name that begins with a dot: what zip and NAS add

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image file and its captions."""

    path: str
    captions: tuple[str, ...]


class FolderSource:
    """Images in a folder, decoded when drawn."""

    def __init__(self, root: str, entries: list[Entry], captioned: bool = True, held_out: bool = True):
        self._root, self._entries, self._captioned, self.held_out = root, entries, captioned, held_out

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self) -> dict[str, ArraySpec]:
        """Image, and caption where the config asks for captions."""
        return {"image": IMAGE, "caption": TEXT} if self._captioned else {"image": IMAGE}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The decoded image at its own size, and one of its captions, "" where it has none."""
        image = {"image": decode(self._entries[index].path)} if asked("image", names) else {}
        return {**image, "caption": pick(rng, self._entries[index].captions)}

    def name(self, index: int) -> str:
        """The path of the image, relative to the folder."""
        return os.path.relpath(self._entries[index].path, self._root)

    def sizes(self) -> np.ndarray:
        """int64 `[N, 2]` heights and widths from the files' headers; zeros where a header cannot be read."""
        with ThreadPoolExecutor(16) as pool:
            return np.array(list(pool.map(header_size, (entry.path for entry in self._entries))), np.int64)

    def buckets(self) -> None:
        """None: its size decides."""


def build(config: SourceConfig, split: Split) -> FolderSource:
    """The folder source of a config. The validation split is the folder `validation_path`, or else a fixed random
    `validation_share` of the sorted paths.

    Raises:
        DataError: the folder is missing or holds no captioned image, or a metadata file is wrong.
    """
    apart = split == "validation" and bool(config.validation_path)
    key, path = ("data.validation_path", config.validation_path) if apart else ("data.path", config.path)
    if not path:
        raise DataError("the data source 'folder' needs data.path, the folder with your images and captions")
    root = os.path.realpath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise DataError(f"{key}: there is no folder {path!r}")
    found = find_images(root) if config.captions == "none" else find_entries(root)
    entries = sorted(found, key=lambda entry: entry.path)
    if config.validation_path:
        return FolderSource(root, entries, config.captions == "needed")
    chosen = hold_out(len(entries), split, config.validation_share)
    held_out = split == "train" or holds_out(len(entries), config.validation_share)
    return FolderSource(root, [entries[i] for i in chosen], config.captions == "needed", held_out)


def find_images(root: str) -> list[Entry]:
    """Every image at or below a folder, each file once, without captions."""
    images = _images(_files(root))
    if not images:
        raise DataError(f"{root} holds no image ({', '.join(sorted(EXTENSIONS))})")
    return [Entry(path, ("",)) for path in images.values()]


def find_entries(root: str) -> list[Entry]:
    """Every captioned image at or below a folder, each file once; see the top of this file for the conventions."""
    files = _files(root)
    images = _images(files)
    metadata = _metadata(files)
    if metadata:
        named = [entry for path in metadata for entry in _read_metadata(path)]
    else:
        named = [entry for path in files if _is_image(path) for entry in _read_sidecar(pathlib.Path(path))]
    entries: dict[str, Entry] = {}
    for entry in named:
        real = files[entry.path] if entry.path in files else os.path.realpath(entry.path)
        known = entries.get(real)
        entries[real] = Entry(known.path, known.captions + entry.captions) if known else entry
    if not entries:
        raise DataError(
            f"{root} holds no captioned image: found {len(images)} image files "
            f"({', '.join(sorted(EXTENSIONS))}), {len(metadata)} metadata files and no caption for any image. Expected "
            "metadata.jsonl or metadata.csv with file_name and text (or caption) columns, or a .txt file beside each "
            "image"
        )
    if left_out := len(images.keys() - entries.keys()):
        log.warning("%s: %d of %d images have no caption and are left out", root, left_out, len(images))
    return list(entries.values())


@dataclasses.dataclass(frozen=True)
class NamedImage:
    """An image file, and all that a folder says of it.

    Attributes:
        path: of the image.
        rows: (place, columns) of the metadata rows that name it, "metadata.csv, line 3" each.
        sidecar: the text file beside it, where no metadata file exists; "" for none.
    """

    path: str
    rows: tuple[tuple[str, Mapping[str, object]], ...] = ()
    sidecar: str = ""


def find_all(root: str) -> list[NamedImage]:
    """Every image at or below a folder, each file once, captioned or not, and every other file that metadata names.

    Sorted by path.

    Raises:
        DataError: there is no image, or a metadata file is wrong.
    """
    files = _files(root)
    images = _images(files)
    metadata = _metadata(files)
    rows: dict[str, list[tuple[str, Mapping[str, object]]]] = {}
    for file in metadata:
        for where, row in _rows(file):
            path = inside(file.parent, _file_name(row, where), where)
            real = files.get(path) or os.path.realpath(path)
            images.setdefault(real, path)
            rows.setdefault(real, []).append((where, row))
    if not images:
        raise DataError(f"{root} holds no image ({', '.join(sorted(EXTENSIONS))})")
    beside = {} if metadata else {path: str(pathlib.Path(path).with_suffix(".txt")) for path in images.values()}
    found = [
        NamedImage(path, tuple(rows.get(real, ())), text if (text := beside.get(path, "")) in files else "")
        for real, path in images.items()
    ]
    return sorted(found, key=lambda image: image.path)


def read_sidecar(path: pathlib.Path) -> str:
    """The caption in a text file, on one line; "" where it holds none.

    Raises:
        DataError: it is not UTF-8.
    """
    return caption_of(_read_text(path), f"{path}:")


def _metadata(files: Mapping[str, str]) -> list[pathlib.Path]:
    """The metadata files among files, at most one in a folder."""
    metadata = [path for path in map(pathlib.Path, files) if path.name in _METADATA]
    _refuse_two_in_one_folder(metadata)
    return metadata


def _files(root: str) -> dict[str, str]:
    """`{path: real path}` of the files at or below a folder, sorted by path. Links are followed, each folder once.

    Raises:
        DataError: a folder cannot be read.
    """
    files: dict[str, str] = {}
    seen: set[str] = set()
    waiting = collections.deque([(root, root)])
    while waiting:
        folder, real_folder = waiting.popleft()
        if real_folder in seen:
            continue
        seen.add(real_folder)
        try:
            with os.scandir(folder) as found:
                inside = sorted(found, key=lambda item: item.name)
        except OSError as error:
            raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error
        for item in inside:
            if item.name.startswith(".") or item.name in _NOT_DATA:
                continue
            real = os.path.realpath(item.path) if item.is_symlink() else os.path.join(real_folder, item.name)
            if not _is_folder(item):
                files[item.path] = real
            elif not item.is_symlink():
                waiting.appendleft((item.path, real))
            elif not _holds(real, real_folder):
                waiting.append((item.path, real))  # after all that is no link: a folder's own name comes first
    return dict(sorted(files.items()))


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself
        return False


def _holds(folder: str, inner: str) -> bool:
    """Whether a folder is, or lies above, another: a link to it from there is a loop."""
    return os.path.commonpath([folder, inner]) == folder


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _images(files: Mapping[str, str]) -> dict[str, str]:
    """`{real path: the first path that leads there}` of the images among files."""
    images: dict[str, str] = {}
    for path, real in files.items():
        if _is_image(path):
            images.setdefault(real, path)
    return images


def _refuse_two_in_one_folder(metadata: list[pathlib.Path]) -> None:
    folders = [path.parent for path in metadata]
    for folder in folders:
        if folders.count(folder) > 1:
            raise DataError(f"{folder} holds both metadata.jsonl and metadata.csv: keep one of them")


def _read_sidecar(image: pathlib.Path) -> Iterator[Entry]:
    text = image.with_suffix(".txt")
    if text.is_file() and (caption := read_sidecar(text)):
        yield Entry(str(image), (caption,))


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}; save it as UTF-8") from error


def caption_of(text: str, where: str) -> str:
    """A caption on one line. Raises `DataError` for what an editor that does not write UTF-8 leaves in it."""
    if "\0" in text:
        raise DataError(f"{where} the caption {text[:80]!a} holds NUL, as UTF-16 does; save the file as UTF-8")
    return " ".join(require_text(text, f"{where} the caption").split())


def _read_metadata(path: pathlib.Path) -> Iterator[Entry]:
    for where, row in _rows(path):
        file_name, captions = _file_name(row, where), _captions(row, where)
        if captions is None:
            columns = ", ".join(str(column) for column in row)
            raise DataError(f"{where}: expected a column text or caption and found the columns {columns}")
        captions = tuple(caption for caption in captions if caption)
        if captions:
            yield Entry(inside(path.parent, file_name, where), captions)


def _file_name(row: Mapping[str, object], where: str) -> str:
    file_name = row.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise DataError(f"{where}: expected a file_name and found the columns {', '.join(map(str, row))}")
    return file_name


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields ("file, line 3", columns)."""
    text = _read_text(path)
    if path.suffix == ".csv":
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object and found {type(row).__name__}")
        yield f"{path}, line {number}", row


def _csv_rows(path: pathlib.Path, text: str) -> Iterator[tuple[str, dict[str, object]]]:
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a caption may be as long as it is
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num + 1} is not CSV: {error}; a caption in double quotes ends with one, and "
            "one inside it is written twice"
        ) from error
    finally:
        csv.field_size_limit(limit)
    for where, row in rows:
        if surplus := row.pop(None, None):  # type: ignore[call-overload]  # where csv keeps them
            columns = list(reader.fieldnames or ())
            raise DataError(
                f"{where}: the row has {len(columns) + len(surplus)} fields and the header {len(columns)} columns "
                f"({', '.join(columns)}); put a caption that holds a comma in double quotes"
            )
        yield where, dict(row)


def _captions(row: dict[str, object], where: str) -> tuple[str, ...] | None:
    for column in CAPTION_COLUMNS:
        if column in row:
            value = row[column]
            values = value if isinstance(value, list) else [value]
            return tuple(caption_of(str(text), f"{where}:") for text in values if text is not None)
    return None


def inside(folder: pathlib.Path | str, file_name: str, where: str) -> str:
    """The path of a file that a metadata row names. Its name may not leave the metadata's folder; a link there may."""
    try:
        named = os.fsencode(file_name)
    except UnicodeEncodeError:
        named = b"\0"
    if b"\0" in named:
        raise DataError(f"{where}: file_name {file_name!a} is the name of no file; save the metadata as UTF-8")
    name = os.path.normpath(file_name)
    if os.path.isabs(name) or name.split(os.sep)[0] in (os.pardir, os.curdir):
        raise DataError(f"{where}: file_name {file_name!r} leaves the folder {folder}; expected a path inside it")
    return os.path.join(folder, name)
