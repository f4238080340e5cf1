"""`snapgen export --app`: an app around the bundle of a run, or around one that is there."""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from snapgen_jax.training.exits import ConfigError

OPEN = {"web": "open it by `python {out}/serve.py`", "android": "open that folder in Android Studio"}


def add_app(export: argparse.ArgumentParser) -> None:
    """The options of `snapgen export` that are of apps."""
    from snapgen_jax.export.apps import KINDS

    source = export.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of the run, local or gs://")
    source.add_argument("--bundle", help="an exported bundle, which --app wraps as it is")
    export.add_argument(
        "--app",
        choices=KINDS,
        help="write an app around the bundle, in the folder --out (default: web or android beside the bundle)",
    )


# Options that change a bundle while it is made.
_OF_A_RUN = ("decoder", "adapters", "precisions", "packed", "sizes", "title", "license", "encoders", "adaptive")


def export_app(options: argparse.Namespace, export: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Writes the app that `options` name; `export(folder)` writes the run's bundle there, and says what it measured.

    Raises:
        ConfigError: --bundle stands without --app, or with an option of exporting a run; `--out` is in an object store;
            or see `write_app`.
    """
    from snapgen_jax.export.apps import check_place, write_app
    from snapgen_jax.training.files import on_object_store

    if not options.app:
        raise ConfigError("--bundle goes with --app=web or --app=android; a run is exported by --workdir")
    unused = [f"--{name}" for name in _OF_A_RUN if getattr(options, name)] + [
        f"--{name}" for name in options.generation
    ]
    if options.bundle and unused:
        raise ConfigError(f"{', '.join(unused)} goes with --workdir; an app takes the bundle of --bundle as it is")
    beside = pathlib.Path(options.bundle).absolute().parent if options.bundle else f"{options.workdir}/export"
    place = options.out or f"{beside}/{options.app}"
    if on_object_store(place):
        raise ConfigError(f"an app is made of local files, and {place} is not; give --out a local folder, and copy it")
    out = pathlib.Path(place)
    if options.bundle:
        write_app(options.app, options.bundle, out)
        report: dict[str, Any] = {}
    else:
        check_place(options.app, out)  # before minutes are spent
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial.", dir=out.absolute().parent) as scratch:
            report = export(f"{scratch}/bundle")
            write_app(options.app, f"{scratch}/bundle", out)
    print(f"wrote the app to {out}; {OPEN[options.app].format(out=out)}")
    return report
