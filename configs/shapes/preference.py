"""Diffusion-DPO in the shapes world: the network of `adapters_base.py` learns from pairs of its own images.

    snapgen chain --config=configs/shapes/preference_chain.py --workdir=preference       # the pairs too

`preference_chain.py` draws the pairs; `data.path` is their folder. Nothing is sampled in training, and no reward is
asked. Machine: two CPU cores. Metric: `validation_loss.accuracy`, the share of held-out pairs whose better image has
the higher implicit reward; `score.overall` is what it is for.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`."""
    c = adapters_base.get_config(arg)
    c.recipe = "preference"
    c.base = "runs/base"
    c.data.source = "stored"
    c.data.path = "pairs"
    c.data.validation_share = 0.1
    c.trains = "adapters"
    c.lora = ConfigDict(
        {"rank": 8, "alpha": 8.0, "targets": (r"unet/.*attention/(query|key|value|out)$", r"unet/.*ffn/")}
    )
    c.beta = 500.0
    c.inputs.caption_dropout = 0.0
    c.train_steps = 1_000
    c.optimizer = ConfigDict({"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 50, "weight_decay": 0.0})
    c.ema_decay = 0.99
    c.checkpoint.every_steps = 250
    during = ("validation_loss", "sample_grid")
    c.evaluation = ConfigDict({"every_steps": 250, "during": during, "final": (*during, "compositional")})
    if arg == "runlocal":
        c.train_steps = 6
        c.lora.rank = 2
        c.optimizer.warmup_steps = 2
        c.checkpoint.every_steps = 3
        c.evaluation = ConfigDict({"every_steps": 3, "during": ("validation_loss",), "final": ("validation_loss",)})
    return c
