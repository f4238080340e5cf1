"""SnapFusion's robust training in the shapes world: a network that knows to do without any one of its blocks.

    snapgen train --config=configs/shapes/robust.py --workdir=runs/robust
    snapgen train --config=configs/shapes/robust.py --workdir=runs/robust --config.init_from=runs/base

The first line trains from nothing, as the first stage of `evolve.py`; the second goes on with a run of
`adapters_base.py`. Machine: two CPU cores. Time: ten minutes. Metric: `validation_loss.without.one`, by how much the
loss is higher without a block, below that of `--config.drop=0 --config.final_drop=0`.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `adapters_base.py`."""
    c = adapters_base.get_config(arg)
    c.recipe = "block_dropping"
    c.drop, c.final_drop = 0.1, 0.2
    c.network.blocks = ()  # filled in by the stages of `evolve.py`
    c.moved = ()
    c.evaluation.final = ("validation_loss", "sample_grid")
    return c
