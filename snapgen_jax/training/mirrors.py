"""Places that show the metrics of a run beside its JSON lines: TensorBoard, trackio and Weights & Biases.

A mirror is a copy. Nothing is read back from it, and a run is the same without it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import logging
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from etils import epath

from snapgen_jax.training.appended import AppendedFile
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import on_object_store, write_whole

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MirrorConfig:
    """A service that a run reports to, beside TensorBoard. Its own environment variables say how it is reached:
    `WANDB_MODE=offline`, `WANDB_API_KEY`, `WANDB_ENTITY`, `WANDB_DIR`; `TRACKIO_SPACE_ID`, `TRACKIO_DIR`. trackio
    without a space, and wandb offline, write to this machine alone.

    Attributes:
        kind: the service, or "none".
        project: the name under which it groups runs.
    """

    kind: Literal["none", "trackio", "wandb"] = "none"
    project: str = "snapgen"

    def check_installed(self) -> None:
        """Raises ConfigError if the service's package is not installed."""
        if self.kind != "none" and importlib.util.find_spec(self.kind) is None:
            raise ConfigError(
                f"mirror.kind={self.kind!r} needs the package {self.kind}, which is not installed; install "
                '"snapgen-jax[mirrors]", or set mirror.kind=none'
            )


NO_MIRROR = MirrorConfig()


class Mirror(Protocol):
    """What metrics are copied to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name. Steps never fall within a process."""
        ...

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds pictures by name, uint8 [H, W, 3]."""
        ...

    def flush(self) -> None:
        """Makes what was added visible."""
        ...

    def close(self) -> None:
        """Ends the copy."""
        ...


class TensorBoard:
    """Event files in `tensorboard/` of a workdir; in an object store, segments of one event file."""

    def __init__(self, workdir: epath.Path, start_step: int):
        self._folder = workdir / "tensorboard"
        self._purge: int | None = start_step + 1  # events of lost updates are hidden from here on
        self._suffix = f".{start_step}"  # the rest of a file's name is the same for two starts within a second
        self._stored = AppendedFile(self._folder / "events.out.tfevents") if on_object_store(workdir) else None
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._writer: Any = None

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._temporary = None if self._stored is None else tempfile.TemporaryDirectory()
            folder = str(self._folder) if self._temporary is None else self._temporary.name
            self._writer = SummaryWriter(folder, purge_step=self._purge, filename_suffix=self._suffix)
            self._purge = None
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name."""
        for name, value in values.items():
            self._open().add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds pictures by name, uint8 [H, W, 3]."""
        for name, picture in pictures.items():
            self._open().add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """In an object store: moves the events since the last call to a segment. A disk's are flushed by time."""
        if self._stored is not None:
            self.close()

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is None:
            return
        self._writer.close()  # the one call after which all events are in the file
        self._writer = None
        if self._stored is not None and self._temporary is not None:
            for file in pathlib.Path(self._temporary.name).iterdir():
                self._stored.append(file.read_bytes())
            self._temporary.cleanup()


class _Service:
    """A run of trackio or Weights & Biases, which have one interface."""

    def __init__(self, config: MirrorConfig, workdir: epath.Path):
        self._module = importlib.import_module(config.kind)
        name = _name_of_run(config, workdir)
        path = workdir / "config.json"
        arguments: dict[str, Any] = {"config": json.loads(path.read_text()) if path.exists() else {}}
        if config.kind == "wandb":
            arguments["id"] = name
            arguments["settings"] = self._module.Settings(console="off")
            if not on_object_store(workdir):
                arguments["dir"] = str(workdir)
        else:
            arguments["embed"] = False
        self._run = self._module.init(project=config.project, name=name, resume="allow", **arguments)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        if pictures:
            self._run.log({name: self._module.Image(picture) for name, picture in pictures.items()}, step=step)

    def flush(self) -> None:
        pass  # both send by themselves

    def close(self) -> None:
        self._run.finish()


class _Guarded:
    """A mirror whose failures are logged, the first one alone, and never end a run."""

    def __init__(self, kind: str, open_mirror: Callable[[], Mirror]):
        self._kind, self._failed = kind, False
        self._mirror: Mirror | None = None
        self._mirror = self._try(open_mirror)

    def _try(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # of a service, whose errors are of many kinds
            if not self._failed:
                log.warning("the mirror %s fails, and the run goes on without it: %r", self._kind, error)
            self._failed = True

    def _call(self, method: str, *arguments: Any) -> None:
        if self._mirror is not None:
            self._try(getattr(self._mirror, method), *arguments)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._call("scalars", step, values)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        self._call("pictures", step, pictures)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")


def service(config: MirrorConfig, workdir: epath.Path) -> Mirror:
    """The service of a config as a mirror that cannot end a run; resume continues the same run there.

    Raises:
        ConfigError: its package is not installed.
    """
    config.check_installed()
    return _Guarded(config.kind, lambda: _Service(config, workdir))


def _name_of_run(config: MirrorConfig, workdir: epath.Path) -> str:
    """The run's name at the service, kept in the workdir: drawn at the first start."""
    path = workdir / "metrics" / "mirror.json"
    names = json.loads(path.read_text()) if path.exists() else {}
    key = f"{config.kind}/{config.project}"
    if key not in names:
        names[key] = f"{workdir.name}-{secrets.token_hex(4)}"
        write_whole(path, json.dumps(names) + "\n")
    return names[key]
