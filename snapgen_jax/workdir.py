"""What a workdir says of its run: `config.json`, and `run.json` with versions, commit and flags."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from snapgen_jax.config import Config, from_json, to_json
from snapgen_jax.parallel.hosts import current
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole
from snapgen_jax.weights.folder import is_weights_folder

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "snapgen-jax")


def prepare_workdir(config: ConfigDict, workdir: epath.PathLike, command: list[str] | None = None) -> None:
    """Writes `config.json` and `run.json`, each whole; names what changed if the workdir had another config.

    A run writes them by `Experiment.record`, once its config was compared with its checkpoint. Of several processes the
    first one does.
    """
    if current().index:
        return
    workdir = epath.Path(workdir)
    if (recorded := recorded_config(workdir)) is not None:
        for name, (old, new) in differences(recorded, config).items():
            print(f"config changed since this run began: {name} was {old}, is now {new}")
    write_whole(workdir / "config.json", to_json(config))
    run = {
        "command": command or sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "hosts": jax.process_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "flags": {name: os.environ[name] for name in FLAGS if os.environ.get(name)},
    }
    write_whole(workdir / "run.json", json.dumps(run, indent=2) + "\n")


def recorded_config(workdir: epath.PathLike) -> ConfigDict | None:
    """The config that a workdir began with; None for a new one.

    Raises:
        ConfigError: another version wrote it, or it is a folder of weights; says what to do.
    """
    if is_weights_folder(workdir):
        raise ConfigError(
            f"{workdir} is a folder of weights, in which nothing trains; start from it in a new workdir, with "
            f"--config.init_from={workdir}"
        )
    path = epath.Path(workdir) / "config.json"
    return from_json(path.read_text(), workdir) if path.exists() else None


def differences(old: Config, new: Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of all keys whose values differ."""
    out: dict[str, tuple[Any, Any]] = {}
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping | ConfigDict) and isinstance(b, Mapping | ConfigDict):
            out.update(differences(a, b, f"{prefix}{name}."))
        elif a != b:
            out[f"{prefix}{name}"] = (a, b)
    return out


def _commit() -> str:
    """The commit of the source tree, or "" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=epath.Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
