"""The shapes world at length: the quickstart's network on four times its images.

    snapgen train --config=configs/shapes/night.py --workdir=runs/night
    snapgen evaluate --workdir=runs/night --names=compositional,frechet,diversity

Machine: one GPU, or two CPU cores for three quarters of an hour. Metric: compositional score 0.87, position 0.91 (kept
as `benchmarks/results/quickstart_limits_images.json`: it is what limits the quickstart, too). `night.py:wide` is twice
as wide, and sees sixteen times the quickstart's images: a night of CPU. It has not been run yet; at the quickstart's
number of images that width makes 0.71 of 0.55.
"""

from ml_collections import ConfigDict

from configs.shapes import quickstart

QUICKSTART_STEPS = 8_600


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, "wide", or "runlocal" for a run of a few seconds that shows only that everything works."""
    c = quickstart.get_config(None if arg == "wide" else arg)
    if arg == "runlocal":
        return c
    c.train_steps = 4 * QUICKSTART_STEPS
    c.checkpoint.every_steps = 4000
    c.evaluation = ConfigDict(
        {"every_steps": 20_000, "during": ("sample_grid", "validation_loss"), "final": ("sample_grid", "compositional")}
    )
    if arg == "wide":
        c.train_steps = 16 * QUICKSTART_STEPS
        c.network.channels = (128, 128)
        c.network.head_dim = 64
        c.network.embedding_width = 256
    return c
