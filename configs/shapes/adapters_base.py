"""What `adapters.py` adapts: the quickstart's network, with a text encoder of its own.

    snapgen train --config=configs/shapes/adapters_base.py --workdir=runs/base

Without an argument it is the quickstart's run. Machine: two CPU cores. Time: ten minutes. Metric: `score.overall` 0.66.
"""

from ml_collections import ConfigDict

from configs.shapes import clip, quickstart


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick" for single objects alone; or "runlocal" for a few seconds. "patches" is another name of
    None, as for `clip.py`."""
    if arg not in (None, "patches", "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are patches, quick and runlocal, or nothing")
    c = quickstart.get_config("runlocal" if arg == "runlocal" else None)
    c.data = clip.data(arg)
    if arg == "quick":
        c.train_steps = 6_000
    return c
