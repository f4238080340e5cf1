"""The shapes world's own autoencoder: 4 x 4 pixels become one latent pixel of 8 channels, learnt from nothing.

    snapgen train --config=configs/shapes/autoencoder.py --workdir=runs/autoencoder
    snapgen encode --workdir=runs/autoencoder --out=latents.safetensors photo.png

Machine: two CPU cores. Time: about ten minutes. Metric: `reconstruction.autoencoder.psnr`; half as many updates reach
33.8 dB (`benchmarks/results/decoder.json`).
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for a run of a few seconds that shows only that everything works."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "autoencoder"
    c.train_steps = 3_000
    c.batch_size = 16
    c.log_every_steps = 100
    c.inputs = ConfigDict({"kind": "images", "image_sizes": ((32, 32),)})
    c.data = ConfigDict({"source": "shapes", "shapes": {"size": 32}})
    c.autoencoder = ConfigDict({"preset": "shapes"})
    c.kl_weight = 6e-4
    c.loss = ConfigDict({"l1": 1.0, "l2": 0.0, "perceptual": 0.1, "adversarial": 0.05, "adversarial_from_steps": 1_500})
    c.perceptual = ConfigDict({"preset": "shapes"})  # a random network: no weights are needed
    c.discriminator = ConfigDict({"preset": "shapes"})
    c.optimizer = ConfigDict({"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 100})
    c.discriminator_optimizer = ConfigDict({"learning_rate": 2e-4, "warmup_steps": 0, "b1": 0.5})
    c.ema_decay = 0.995
    c.checkpoint = ConfigDict({"every_steps": 500})
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": ("reconstruction",), "final": ("reconstruction",)})
    if arg == "runlocal":
        c.train_steps = 8
        c.batch_size = 4
        c.log_every_steps = 4
        c.autoencoder = ConfigDict({"preset": "smoke", "normalisation": "measured"})
        c.perceptual = ConfigDict({"preset": "smoke"})
        c.discriminator = ConfigDict({"preset": "smoke"})
        c.loss.adversarial_from_steps = 4
        c.checkpoint.every_steps = 4
        c.evaluation.every_steps = 0
    return c
