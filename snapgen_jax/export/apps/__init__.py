"""Apps around a bundle: what `snapgen export --app=web|android` writes."""

from __future__ import annotations

import hashlib
import importlib
import json
import pathlib
import shutil
import tempfile
from typing import Literal

from snapgen_jax.export.client import check_manifest
from snapgen_jax.export.packed import unpack_bundle
from snapgen_jax.export.program import BundleError
from snapgen_jax.training.exits import ConfigError

Kind = Literal["web", "android"]
KINDS: tuple[Kind, ...] = ("web", "android")
SOURCES: tuple[Kind, ...] = ("android",)  # projects that their owner changes and builds: they are never replaced
MARK = "app.json"  # lies in every app: a folder that holds it may be replaced


def write_app(kind: Kind, bundle: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """Writes an app around a bundle.

    It is written beside its place under another name, and moved: it is whole or it is not there.

    Args:
        kind: which app.
        bundle: the bundle's folder, which is copied.
        out: the app's folder. A web app may replace a web app; any other folder that is not empty is refused.

    Returns:
        `out`, absolute.

    Raises:
        ConfigError: there is no such app, the bundle is none that the app can run, or `out` holds something else.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no app {kind!r}; there is {' and '.join(KINDS)}")
    try:
        bundle, out = check_manifest(bundle), pathlib.Path(out).absolute()
    except BundleError as error:
        raise ConfigError(str(error)) from error
    if out == bundle or out.is_relative_to(bundle) or bundle.is_relative_to(out):
        raise ConfigError(f"the app {out} and the bundle {bundle} would lie in each other; give --out another folder")
    check_place(kind, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial.", dir=out.parent) as scratch:
        made = pathlib.Path(scratch) / "app"
        made.mkdir()
        importlib.import_module(f"{__name__}.{kind}").write(bundle, made)
        (made / MARK).write_text(json.dumps({"app": kind}) + "\n", "utf-8")
        if out.exists():
            out.rename(pathlib.Path(scratch) / "before")
        made.rename(out)
    return out


def check_place(kind: Kind, out: str | pathlib.Path) -> None:
    """Raises `ConfigError` where a folder holds something that an app of this kind may not replace."""
    out = pathlib.Path(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; give --out a folder for the app")
    if kind in SOURCES and any(out.iterdir()):
        raise ConfigError(
            f"{out} holds files, and an {kind} project is never replaced: it may hold changes of yours. Name another "
            "folder, or move this one"
        )
    if any(out.iterdir()) and not _is_app(kind, out):
        raise ConfigError(f"{out} holds files and is no {kind} app; name another folder, or empty this one")


def _is_app(kind: Kind, folder: pathlib.Path) -> bool:
    try:
        return json.loads((folder / MARK).read_text("utf-8")) == {"app": kind}
    except (OSError, ValueError):
        return False


def copy_bundle(bundle: pathlib.Path, place: pathlib.Path) -> None:
    """Copies the files that a bundle's manifest lists, and the manifest. Packed networks are unpacked: no app does it.

    Raises:
        ConfigError: one of them is not there, or is not the one that was exported.
    """
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    for name, expected in {"manifest.json": {}, **manifest["files"]}.items():
        source, target = bundle / name, place / name
        if not target.resolve().is_relative_to(place.resolve()) or not source.is_file():
            raise ConfigError(f"the bundle {bundle} lists {name!r} and has no such file; export it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected.get("sha256", digest):
            raise ConfigError(
                f"the file {name!r} of the bundle {bundle} is damaged: its checksum is not the manifest's"
            )
    if any("packed" in unit for unit in manifest.get("units", {}).values()):
        try:
            unpack_bundle(place)
        except BundleError as error:
            raise ConfigError(f"the bundle {bundle}: {error}") from error
