"""A bounded reward of the shapes world: the probability that an image shows what a caption says.

    snapgen train --config=configs/shapes/matching.py --workdir=runs/matching --config.tokenizer_workdir=runs/base

It learns from renders. Each has a true caption and one that is false in one fact: a colour, a kind, a number, a place,
which colour is whose, or an object too many or too few. The exact detector, `snapgen_jax/evaluation/detector.py`, is
not used, and so can judge what the reward has taught. `tokenizer_workdir` names the generator that is to be rewarded,
whose tokens it then reads; without it one is trained, which is that of a generator of the same `data.shapes`.
Machine: two CPU cores. Metric: `matching.accuracy.CHANGE`, chance is 0.5. Not yet trained to its end: after 1,500
updates, held-out accuracy is 0.99 for objects, 0.80 number, 0.69 colour, 0.50 kind, 0.50 position and 0.49 binding.
"""

from ml_collections import ConfigDict

from configs.shapes import clip

CHANGES = ("colour", "kind", "number", "position", "binding", "objects")


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick" for the simpler world of single objects; or "runlocal" for a few seconds."""
    if arg not in (None, "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are quick and runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "matching"
    c.train_steps = {"quick": 1_500, "runlocal": 6}.get(arg or "", 6_000)
    c.batch_size = 32
    c.log_every_steps = 100
    c.data = clip.data(arg)
    c.data.source = "shapes_changes"
    c.data.texts = {"other_tokens": "other_caption"}
    text = clip.text(arg)
    text.update({"layers": 1, "neighbours": 4, "attention": "full", "embedding_std": 1.0, "output": "last"})
    c.network = ConfigDict({"text": text, "blocks": 1, "layers": 2})
    c.negatives = "caption"
    c.batch_share = 0.3
    c.changes = CHANGES
    c.noise = 0.1
    c.blur = 1.0
    c.optimizer = ConfigDict({"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 200})
    c.ema_decay = 0.998
    c.checkpoint = ConfigDict({"every_steps": 1_000})
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": ("matching",), "final": ("matching",)})
    if arg == "runlocal":
        c.batch_size = 8
        c.log_every_steps = 3
        c.network = ConfigDict({"preset": "smoke", "image_size": 32, "text": text})
        c.optimizer.warmup_steps = 2
        c.checkpoint.every_steps = 3
        c.evaluation.every_steps = 3
    return c
