"""What the config of an earlier run says, and whether that is what a config here says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from snapgen_jax.diffusion.schedules import Prediction, Schedule
from snapgen_jax.training.exits import ConfigError


def run_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The config of a run, as it was when trained; `{}` if it was trained without one, by `training.loop` alone."""
    path = epath.Path(workdir) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_output(
    workdir: str, run: Mapping[str, Any], prediction: Prediction, schedule: Schedule, prefix: str = ""
) -> None:
    """Raises where the network of a run predicts something else than the config says, or under another schedule.

    Args:
        workdir: of the run.
        run: its config; what it does not say is not compared.
        prediction, schedule: what the config says of that network. The density of training times and the steps of
            sampling may differ: no network knows them.
        prefix: of these fields in the config, such as "teacher.".

    Raises:
        ConfigError: they differ.
    """
    was, trained = run.get("schedule", {}), schedule.network_fields
    said = {"prediction": prediction, **{f"schedule.{name}": getattr(schedule, name) for name in ("kind", *trained)}}
    found = {"prediction": run.get("prediction"), **{f"schedule.{name}": value for name, value in was.items()}}
    for name, value in said.items():
        if found.get(name) not in (None, value):
            raise ConfigError(
                f"the run {workdir!r} has {name}={found[name]!r}, and {prefix}{name} is {value!r}; set it to that of "
                "the run"
            )
