"""Packed networks of a bundle: put in the place of their files of eight bits, and unpacked again for clients that
cannot."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal

from snapgen_jax.export.client import MANIFEST_SCHEMA, Bundle
from snapgen_jax.export.compare import VerificationError
from snapgen_jax.export.levels import Kept
from snapgen_jax.export.manifest import write_json
from snapgen_jax.export.packing import Original, write_packed
from snapgen_jax.export.unpacking import PackedFile
from snapgen_jax.training.exports import Stored

Form = Literal["plain", "packed"]
NOTHING_PACKED = (
    "no network of this run has weights that were trained to take few values; leave it out, or export a run of a "
    "recipe that trains them"
)
FORMAT = pathlib.Path(__file__).with_name("packing.md")


def pack(folder: pathlib.Path, name: str, kept: Kept, storage: Mapping[str, Stored]) -> tuple[str, dict[str, Any]]:
    """Puts a packed file in the place of a unit's file of eight bits.

    Args:
        folder: of the bundle.
        name: of the file.
        kept: what `keep_levels` returned of it.
        storage: the unit's weights of few levels.

    Returns:
        The packed file's name, and what the manifest says of the file that it expands to: "bytes", "sha256", and how
        many "weights" of how many bits it has.

    Raises:
        VerificationError: none of the weights is in the file.
    """
    if not kept.axes:
        raise VerificationError(
            f"{name} has none of the {len(storage)} weights that were trained to take few values: the converter has "
            "changed them all, so there is nothing to pack. Export without --packed"
        )
    plain, packed = folder / name, (folder / name).with_suffix(".packed")
    weights = {path: storage[path] for path in kept.axes}
    write_packed(packed, weights, original=Original(plain, kept.fillings, kept.axes))
    with plain.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    counts: dict[str, int] = {}
    for stored in weights.values():
        counts[str(stored.bits)] = counts.get(str(stored.bits), 0) + stored.integers.size
    described = {"bytes": plain.stat().st_size, "sha256": digest, "weights": dict(sorted(counts.items()))}
    plain.unlink()
    return packed.name, described


def write_format(folder: pathlib.Path) -> None:
    """Puts the page that describes packed files into a bundle."""
    shutil.copyfile(FORMAT, folder / "PACKING.md")


def unpacked_bytes(manifest: Mapping[str, Any]) -> int:
    """The bytes of a bundle's files when all are unpacked."""
    files = {name: file["bytes"] for name, file in manifest["files"].items()}
    for unit in manifest["units"].values():
        for precision, whole in unit.get("packed", {}).items():
            files[unit["files"][precision]] = whole["bytes"]
    return sum(files.values())


def unpack_bundle(folder: pathlib.Path) -> None:
    """Makes a bundle with packed networks one of plain files, in place.

    Raises:
        PackedError: a packed file is damaged.
    """
    bundle = Bundle(folder)
    manifest, done = json.loads((folder / "manifest.json").read_text("utf-8")), set()
    for unit in manifest["units"].values():
        for precision, whole in unit.pop("packed", {}).items():
            packed = bundle.file(unit["files"][precision])
            plain = packed.with_suffix(".tflite")
            if plain.name not in manifest["files"]:  # or another unit has the same file
                with PackedFile(packed) as file:
                    file.expand(plain)
                manifest["files"][plain.name] = {"bytes": whole["bytes"], "sha256": whole["sha256"]}
            unit["files"][precision] = plain.name
            done.add(packed)
    for packed in done:
        packed.unlink()
        del manifest["files"][packed.name]
    write_json(folder / "manifest.json", {**manifest, "schema": MANIFEST_SCHEMA})
