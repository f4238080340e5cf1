"""A differentiable detector of the shapes world: how well an image shows what a caption demands, as a bounded reward.

    snapgen train --config=configs/shapes/detection.py --workdir=runs/detection

It learns from renders, whose objects are known: kinds, colours, numbers and places at once. The exact detector,
`snapgen_jax/evaluation/detector.py`, is not used, and so can judge what the reward has taught. It reads what a caption
demands and no tokens, so it serves any generator of this world whose captions are phrases (`data.shapes.dense_share`
0). Machine: two CPU cores. Time: three and a half processor minutes. Metric: `matching.accuracy.CHANGE`, chance is 0.5:
1.0 for every change.
"""

from ml_collections import ConfigDict

from configs.shapes import clip, matching


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick" for the simpler world of single objects; or "runlocal" for a few seconds."""
    if arg not in (None, "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are quick and runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "detection"
    c.train_steps = {"quick": 1_000, "runlocal": 6}.get(arg or "", 3_000)
    c.batch_size = 32
    c.log_every_steps = 100
    c.data = clip.data(arg)
    c.data.source = "shapes_changes"
    c.data.texts = {"other_demands": "other_caption"}
    c.data.shapes.dense_share = 0.0
    c.data.shapes.shares.mixed = 0.1
    c.network = ConfigDict({"preset": "shapes"})
    c.changes = matching.CHANGES
    c.noise = 0.1
    c.blur = 1.0
    c.mixed = 0.25
    c.optimizer = ConfigDict({"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 200})
    c.ema_decay = 0.998
    c.checkpoint = ConfigDict({"every_steps": 1_000})
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": ("matching",), "final": ("matching",)})
    if arg == "runlocal":
        c.batch_size = 8
        c.log_every_steps = 3
        c.network = ConfigDict({"preset": "smoke", "image_size": 32})
        c.optimizer.warmup_steps = 2
        c.checkpoint.every_steps = 3
        c.evaluation.every_steps = 3
    return c
