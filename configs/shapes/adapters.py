"""Ten pictures of a moon, which the shapes world has not: the quickstart's network learns to draw one when asked.

    snapgen train --config=configs/shapes/quickstart.py --workdir=runs/base
    snapgen train --config=configs/shapes/adapters.py --workdir=runs/moon --config.base=runs/base
    snapgen sample --workdir=runs/moon --prompt="a red moon"
    snapgen adapters export --workdir=runs/moon --out=moon         # peft's files

Three of four examples are of the shapes world, so that what was known stays known. `docs/adapters.md` says how to do it
with own pictures. Machine: two CPU cores. Time: two minutes. Metric: `new_object.score`; `score.overall` must stay.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`."""
    c = adapters_base.get_config(arg)
    c.recipe = "adapters"
    c.base = "runs/base"
    # With as many of the old as of the new the old score fell by 0.06; `docs/adapters.md`.
    c.data.mixture = ({"source": "new_object"}, {"source": "shapes", "shapes": c.data.shapes, "weight": 3.0})
    # The new word's tokens were never trained, and so the table that holds them is adapted too.
    targets = (r"attention/(query|key|value|out)$", r"ffn/", r"text/.*(inner|outer)$", r"text/token_embedding$")
    c.lora = ConfigDict({"rank": 8, "alpha": 8.0, "targets": targets})
    c.train_steps = 1_500
    c.optimizer = ConfigDict({"learning_rate": 3e-3, "schedule": "linear", "warmup_steps": 50, "weight_decay": 0.0})
    c.ema_decay = 0.99
    c.sample_prompts = (
        "a moon",
        "a red moon",
        "a blue moon",
        "a photo of a black moon",
        "a red circle",
        "a blue square",
        "a green star",
        "a yellow ring",
    )
    c.checkpoint.every_steps = 500
    c.evaluation = ConfigDict({"every_steps": 500, "during": ("sample_grid",), "final": ("sample_grid", "new_object")})
    if arg == "runlocal":
        c.train_steps = 6
        c.lora.rank = 2
        c.optimizer.warmup_steps = 2
        c.checkpoint.every_steps = 3
        c.evaluation.every_steps = 3
    return c
