"""Stage I of BitsFusion in the shapes world: a trained network's weights in about two bits, learning from the network.

    snapgen train --config=configs/shapes/quantised.py --workdir=runs/two_bits --config.base=runs/base \
        --config.init_from=runs/base

runs/base is the run of `adapters_base.py`. All layers have the same bits; `bits.py` is the chain that measures how many
each needs. Machine: two CPU cores. Time: three minutes. Metric: `validation_loss.mean`, beside the base run's.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`, but for "patches"."""
    c = adapters_base.get_config(arg)
    c.recipe = "quantised"
    c.base = c.init_from = "runs/base"
    c.default_bits = 2
    c.schedule = ConfigDict({"kind": "flow", "density": "power", "density_power": 3.0})
    c.train_steps = 2_000
    # The paper's rate, a constant 1e-5, is for a network of 860M parameters that is trained for longer. At a higher one
    # weights near the border of two levels go on jumping to the end, unless it falls.
    c.optimizer = ConfigDict({"learning_rate": 5e-4, "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.0})
    c.ema_decay = 0.0
    c.checkpoint.every_steps = 1_000
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": (), "final": ("validation_loss", "sample_grid")})
    if arg == "quick":
        c.train_steps = 1_000
    if arg == "runlocal":
        c.train_steps = 6
        c.checkpoint.every_steps = 3
    return c
