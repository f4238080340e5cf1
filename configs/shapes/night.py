"""The shapes world at length: the quickstart's network on eight times its images, for a GPU or a night of CPU.

    snapgen train --config=configs/shapes/night.py --workdir=runs/night
    snapgen evaluate --workdir=runs/night --names=compositional,frechet,diversity

Machine: one GPU, or two CPU cores for an hour and a quarter. The aim is a compositional score as close to 1 as it goes,
position included.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for a run of a few seconds that shows only that everything works."""
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"](arg)
    if arg == "runlocal":
        return c
    c.train_steps = 68_800  # eight times the quickstart's
    c.ema_decay = 0.9995
    c.checkpoint.every_steps = 4000
    c.evaluation = ConfigDict(
        {"every_steps": 20_000, "during": ("sample_grid", "validation_loss"), "final": ("sample_grid", "compositional")}
    )
    return c
