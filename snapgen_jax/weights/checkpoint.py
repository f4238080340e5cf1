"""A folder of safetensors files in the Hugging Face layout: which tensors it holds, and slices of them.

A folder holds one set of weights: one `*.safetensors` file, or several with an `*.safetensors.index.json` that says
which tensor is in which. Nothing else is read; in particular no pickle (`*.bin`, `*.ckpt`, `*.pt`), which may execute
code.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from snapgen_jax.weights.sources import Source

# The same weights once more, in another dtype or not averaged, as diffusers and transformers name them: before the
# number of a shard and the end of an index, or, in older repositories, after the number and before "index".
VARIANTS = ("fp16", "bf16", "fp32", "ema", "non_ema")
_ONE = f"({'|'.join(VARIANTS)})"
_FILE = re.compile(rf"[^.]+?(?:\.{_ONE})?(?:-\d+-of-\d+)?(?:\.{_ONE})?\.safetensors")
_INDEX = re.compile(rf"[^.]+\.safetensors(?:\.{_ONE})?\.index(?:\.{_ONE})?\.json")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack")
FLOATS = ("BF16", "F16", "F32")
# A memory-mapped file counts as memory of the process for as long as it is open, so it is reopened now and then.
_MAPPED_BYTES = 64 * 2**20


class WeightsError(ValueError):
    """The weights in a folder cannot be used. The message says what was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, and what it is."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: "BF16", "F16", "F32" ...


def read_folder(folder: str | pathlib.Path, *, source: Source | None = None) -> dict[str, Tensor]:
    """Lists the tensors of a folder from the headers of its files; no tensor is read.

    Beside `model.safetensors` a variant (`model.fp16.safetensors`) is left alone; without it the only variant is read.

    Args:
        folder: a local folder.
        source: where the weights are published; quoted by the errors.

    Raises:
        WeightsError: the folder or a file is missing or broken, an index names a file outside the folder, two files
            hold the same tensor, or there are several variants and no plain file.
    """
    folder = pathlib.Path(folder)
    advice = f"\n{source.advice}" if source else ""
    if not folder.is_dir():
        remote = "copy it to a local disk first; " if "://" in str(folder) or ":/" in str(folder) else ""
        raise WeightsError(f"{folder} is not a folder; {remote}weights are read from a local folder.{advice}")

    chosen = _chosen(folder, advice)
    indices = [path for path in chosen if path.suffix == ".json"]
    if len(indices) > 1:
        names = ", ".join(path.name for path in indices)
        raise WeightsError(f"{folder} holds several sets of weights ({names}); move each to a folder of its own")
    listed = _read_index(indices[0], advice) if indices else None
    files = sorted(set(listed.values())) if listed else chosen

    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_header(file, advice).items():
            if name in tensors:
                raise WeightsError(
                    f"tensor {name} is in {tensors[name].file.name} and in {file.name}; a folder must hold one set of "
                    "weights: move one of the files away"
                )
            tensors[name] = tensor
    if listed and (absent := sorted(name for name, file in listed.items() if _elsewhere(tensors, name, file))):
        raise WeightsError(f"{indices[0]} lists tensors that its files do not hold: {', '.join(absent)}{advice}")
    return tensors


def _chosen(folder: pathlib.Path, advice: str) -> list[pathlib.Path]:
    """The files and indices that are read: the plain ones, or else those of the only variant there is."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name) or _INDEX.fullmatch(path.name):
            found.setdefault(match[1] or match[2] or "", []).append(path)
    if not found:
        raise WeightsError(_nothing(folder) + advice)
    if "" not in found and len(found) > 1:
        held = "; ".join(f"{variant}: {', '.join(path.name for path in found[variant])}" for variant in sorted(found))
        raise WeightsError(
            f"{folder} holds several variants of its weights and none without one ({held}); keep the one that is "
            "meant, and move the files of the others to another folder"
        )
    return found.get("", next(iter(found.values())))


def _elsewhere(tensors: dict[str, Tensor], name: str, file: pathlib.Path) -> bool:
    return name not in tensors or tensors[name].file != file


def _read_index(index: pathlib.Path, advice: str) -> dict[str, pathlib.Path]:
    """`{tensor: file}` of an index, every file of which lies in the folder of the index."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of safetensors files ({error!r}){advice}") from error
    for file in sorted(set(listed.values())):
        if pathlib.PurePosixPath(file).name != file or pathlib.PureWindowsPath(file).name != file:
            raise WeightsError(f"{index} names the file {file!r}; an index may name files of its own folder only")
        if not file.endswith(".safetensors"):
            raise WeightsError(f"{index} names the file {file!r}; only safetensors files are read")
    missing = [file for file in sorted(set(listed.values())) if not (index.parent / file).is_file()]
    if missing:
        raise WeightsError(f"{index} names files that {index.parent} does not hold: {', '.join(missing)}{advice}")
    return {name: index.parent / file for name, file in listed.items()}


def _nothing(folder: pathlib.Path) -> str:
    """What to say of a folder without weights: what it holds in their place."""
    message = f"{folder} holds no safetensors file"
    inner = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if inner:
        message += f"; its folders {', '.join(inner)} do: give the one that is meant"
    if others:
        message += (
            f" of a known name; {', '.join(others)} is neither NAME.safetensors nor a variant (NAME.fp16.safetensors; "
            f"{', '.join(VARIANTS)}): rename it, without a dot in NAME"
        )
    if pickles:
        message += f"; {', '.join(pickles)} may execute code when read, so they are not: save them as safetensors"
    return message


def _read_header(file: pathlib.Path, advice: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="numpy") as handle:
            parts = {name: handle.get_slice(name) for name in handle.offset_keys()}
            return {name: Tensor(file, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} ({file.stat().st_size:,} bytes) is not a whole safetensors file ({error}); fetch it again{advice}"
        ) from error


class Reader:
    """Reads slices of tensors. A context manager: leaving it closes the files.

    At most `_MAPPED_BYTES` and one slice stay mapped, whatever the size of the files.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors
        self._handles: dict[pathlib.Path, Any] = {}
        self._mapped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._close()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in the dtype of the file; `index` holds one slice for every axis."""
        tensor = self._tensors[name]
        if self._mapped > _MAPPED_BYTES:
            self._close()
        if tensor.file not in self._handles:
            self._handles[tensor.file] = safe_open(tensor.file, framework="numpy").__enter__()
        handle = self._handles[tensor.file]
        array = handle.get_slice(name)[index] if index else handle.get_tensor(name)
        self._mapped += array.nbytes
        return array

    def _close(self) -> None:
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles, self._mapped = {}, 0
