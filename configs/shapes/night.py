"""The shapes world at length: the quickstart's layout on finer patches and twice as wide, for a GPU or a night of CPU.

    snapgen train --config=configs/shapes/night.py --workdir=runs/night
    snapgen evaluate --workdir=runs/night --names=compositional,frechet,diversity

Machine: one GPU, or two CPU cores for some nine hours. The aim is a compositional score as close to 1 as it goes,
position included. No run has been made to its end yet.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for a run of a few seconds that shows only that everything works."""
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"](arg)
    if arg == "runlocal":
        return c
    c.train_steps = 100_000
    c.batch_size = 32
    c.codec.patch = 2
    c.unet.update(latent_channels=12, channels=(64, 128), embedding_width=256, down_depth=(0, 2), up_depth=(0, 2))
    c.unet.mid_depth = 2
    c.prediction = "velocity"  # 12 channels of noise pass through a network 64 wide
    c.text.update(width=128, heads=4, layers=2, projection=128)
    c.unet.update(context_width=128, pooled_width=128)
    c.optimizer = ConfigDict({"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 1000})
    c.ema_decay = 0.9995
    c.checkpoint.every_steps = 2000
    c.evaluation = ConfigDict(
        {"every_steps": 10_000, "during": ("sample_grid", "validation_loss"), "final": ("sample_grid", "compositional")}
    )
    return c
