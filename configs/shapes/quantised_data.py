"""Stage II of BitsFusion in the shapes world: the quantised network of stage I goes on, on data alone.

    snapgen train --config=configs/shapes/quantised_data.py --workdir=runs/two_bits_data --config.base=runs/base \
        --config.init_from=runs/two_bits

Machine: two CPU cores. Time: two minutes. Metric: `validation_loss.mean`, beside that of stage I.
"""

from ml_collections import ConfigDict

from configs.shapes import quantised


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `quantised.py`."""
    c = quantised.get_config(arg)
    c.init_from = "runs/two_bits"
    c.learns_from = "data"
    c.optimizer.learning_rate = 1e-4  # at that of stage I, the loss of 0.91 that stage I left rose to 0.97
    return c
