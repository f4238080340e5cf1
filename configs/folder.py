"""A person's own images: a folder with captions in metadata.jsonl, metadata.csv, or a .txt beside each image.

    snapgen train --config=configs/folder.py --config.data.path=PHOTOS --workdir=runs/mine
    snapgen sample --workdir=runs/mine --prompt="..."

Machine: two CPU cores make about a thousand steps in ten minutes at 64 px, enough to see colours and layout of a small
folder; one GPU or a TPU slice for more.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for a run of a few seconds that shows only that everything works."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "flow_matching"
    c.train_steps = 2_000
    c.batch_size = 16
    c.data = ConfigDict({"source": "folder", "path": "", "vocab_size": 2048, "flip": "none"})
    c.network = ConfigDict({"kind": "unet", "preset": "shapes"})
    c.inputs = ConfigDict(
        {
            "kind": "captions",
            "image_sizes": ((64, 64), (48, 80), (80, 48)),
            "text": {"preset": "shapes", "vocab_size": 2048, "max_tokens": 48},
            "codec": {"kind": "patch", "patch": 4, "scale": 2.0, "shift": 0.0},
        }
    )
    c.optimizer = ConfigDict({"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100})
    c.ema_decay = 0.995
    c.sampling = ConfigDict({"steps": 28, "guidance": 2.0})
    c.checkpoint = ConfigDict({"every_steps": 200})
    c.evaluation = ConfigDict({"every_steps": 500, "during": ("sample_grid", "validation_loss")})
    if arg == "runlocal":
        c.train_steps = 12
        c.batch_size = 4
        c.log_every_steps = 4
        c.network = ConfigDict({"kind": "unet", "preset": "smoke", "latent_channels": 48})
        c.inputs.text = ConfigDict({"preset": "smoke", "vocab_size": 2048, "max_tokens": 48})
        c.optimizer.warmup_steps = 5
        c.sampling.steps = 2
        c.checkpoint.every_steps = 6
        c.evaluation.every_steps = 6
    return c
