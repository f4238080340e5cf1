"""The quickstart: a SnapGen UNet and its text encoder learn the shapes world from nothing.

    snapgen quickstart --workdir=quickstart

Machine: two CPU cores.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for a run of a few seconds that shows only that everything works."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "flow_matching"
    c.train_steps = 10_000
    c.batch_size = 32
    c.log_every_steps = 100
    c.image_sizes = ((32, 32),)
    c.data = ConfigDict({"source": "shapes", "vocab_size": 512, "shapes": {"size": 32}})
    c.codec = ConfigDict({"kind": "patch", "patch": 4})
    c.unet = ConfigDict({"preset": "shapes"})
    c.text = ConfigDict({"preset": "shapes", "max_tokens": 24})
    c.optimizer = ConfigDict({"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 200, "final_share": 0.02})
    c.ema_decay = 0.998
    c.sampling = ConfigDict({"steps": 24, "guidance": 2.0})
    c.checkpoint = ConfigDict({"every_steps": 1000})
    c.evaluation = ConfigDict({"every_steps": 2000, "during": ("sample_grid",), "final": ("sample_grid",)})
    if arg == "runlocal":
        c.train_steps = 20
        c.batch_size = 8
        c.log_every_steps = 5
        c.unet = ConfigDict({"preset": "smoke", "latent_channels": 48})
        c.text = ConfigDict({"preset": "smoke", "vocab_size": 512, "max_tokens": 24})
        c.optimizer.warmup_steps = 5
        c.sampling.steps = 2
        c.checkpoint.every_steps = 10
        c.evaluation.every_steps = 10
    return c
