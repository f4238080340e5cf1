"""CLIP in the shapes world: the text encoder that the later stages condition on, and a score of how an image fits.

    snapgen train --config=configs/shapes/clip.py --workdir=runs/clip

First stage of `chain.py`. Machine: two CPU cores. Metric: `validation_loss.accuracy`, the share of images whose caption
is told apart from the other 63 of the batch.
"""

from ml_collections import ConfigDict

from configs.shapes import quickstart


def data(arg: str | None) -> ConfigDict:
    """The world of the whole chain: the quickstart's. In twenty minutes no stage learns relations, and so the shortest
    form shows single objects, with and without the name of their colour."""
    c = quickstart.get_config().data
    if arg == "quick":
        c.shapes.shares = ConfigDict({**dict.fromkeys(c.shapes.shares, 0.0), "single_object": 0.4, "colours": 0.6})
        c.shapes.dense_share = 0.0
    return c


def text(arg: str | None) -> ConfigDict:
    """The text encoder of the whole chain. Of its two layers the states between them are what a network attends to."""
    if arg == "runlocal":
        return ConfigDict({"preset": "smoke", "vocab_size": 512, "max_tokens": 20})
    return ConfigDict(
        {
            "vocab_size": 512,
            "width": 64,
            "heads": 2,
            "layers": 2,
            "max_tokens": 20,
            "projection": 64,
            "embedding_std": 1.0,
            "attention": "full",
            "neighbours": 4,
            "output": "penultimate",
        }
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "patches" for patches of pixels in place of latents; "quick" for the same in a simpler world, twenty
    minutes for the chain; "runlocal" for a few seconds."""
    if arg not in (None, "patches", "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are patches, quick and runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "contrastive"
    c.train_steps = {"quick": 800, "runlocal": 6}.get(arg or "", 12_000)
    c.batch_size = 64
    c.log_every_steps = 100
    c.data = data(arg)
    inputs = {"kind": "captions", "image_sizes": ((32, 32),), "text": text(arg), "codec": {"kind": "identity"}}
    c.inputs = ConfigDict({**inputs, "caption_dropout": 0.0})
    c.image = ConfigDict({"patch": 4, "width": 64, "layers": 3, "heads": 2, "projection": 64})
    c.optimizer = ConfigDict({"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100})
    c.ema_decay = 0.99
    c.checkpoint = ConfigDict({"every_steps": 1_000})
    c.evaluation = ConfigDict({"every_steps": 2_000, "during": ("validation_loss",), "final": ("validation_loss",)})
    if arg == "runlocal":
        c.batch_size = 8
        c.log_every_steps = 3
        c.image = ConfigDict({"preset": "smoke"})
        c.optimizer.warmup_steps = 2
    return c
