"""What `lazy.py` puts gates on: a DiT of the shapes world with a text encoder of its own.

    snapgen train --config=configs/shapes/lazy_base.py --workdir=runs/dit

A DiT reads one vector of a whole caption, so that it knows what to draw and hardly where, and learns it slowly.
Machine: two CPU cores. Time: half an hour. Metric: `score.overall`.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick", single objects alone; or "runlocal" for a run of a few seconds that shows
    only that everything works."""
    c = adapters_base.get_config(arg)
    if arg == "runlocal":
        c.network = ConfigDict({"kind": "dit", "preset": "smoke", "latent_channels": 48, "sigma": "none"})
        c.inputs.text.update({"width": 16, "heads": 2, "projection": 16})
        return c
    c.network = ConfigDict({"kind": "dit", "preset": "shapes"})
    c.inputs.text.update({"width": 128, "heads": 4, "projection": 128})
    c.train_steps = 20_000
    c.optimizer.learning_rate = 1.5e-3
    return c
