"""LazyDiT (arXiv 2412.12444) at full size: gates of the published DiT-XL/2 at 256 px and its 50-step DDIM sampler.

    hf download facebook/DiT-XL-2-256 --local-dir dit_xl2_256
    snapgen plan  --config=configs/lazy/dit_xl2_256.py --topology=v5e:4x4
    snapgen train --config=configs/lazy/dit_xl2_256.py --config.data.path=TFDS --workdir=gs://BUCKET/lazy_256
    snapgen draw  --workdir=gs://BUCKET/lazy_256 --lazy=0.3 --count=50000 --classes=uniform --out=drawn --npz=drawn.npz

In a minute on a laptop, with scanned digits and a DiT that is trained first:

    snapgen train --config=configs/lazy/dit_xl2_256.py:runlocal,base --workdir=/tmp/lazy_base
    snapgen train --config=configs/lazy/dit_xl2_256.py:runlocal --workdir=/tmp/lazy --config.base=/tmp/lazy_base

TFDS holds `imagenet2012`, see `docs/imagenet.md`. 3,225,600 numbers are trained, a vector of 1,152 for each of 28
blocks, 2 modules and 50 steps. AdamW at 1e-4 without decay, 500 updates of 256 images, label dropout 0.1 and guidance
1.5 are the paper's; so is a price of 1e-7 in its script, and which price skips how much it does not say: train with
several, or set `--lazy`. Its loss also compares the predicted variance, which DDIM does not use.

Machine: 16 chips of TPU v5e, `benchmarks/results/plan/`; the authors had 8 A100 for less than 10 minutes. Metric: FID
of 50,000 images, published as 2.34 for the plain sampler, 2.37 with 20% skipped, 2.46 with 30%, 2.63 with 40% and 2.70
with 50%.
"""

from ml_collections import ConfigDict


def trained_gates() -> ConfigDict:
    """What all gates of full size share: the paper's training."""
    c = ConfigDict()
    c.recipe = "lazy_gates"
    c.train_steps = 500
    c.batch_size = 256
    c.log_every_steps = 20
    c.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 0, "weight_decay": 0.0})
    c.ema_decay = 0.0
    c.rho_attention = c.rho_ffn = 1e-7
    c.checkpoint = ConfigDict({"every_steps": 100})
    c.evaluation = ConfigDict({"during": (), "final": ("validation_loss",)})
    return c


def gates(size: int) -> ConfigDict:
    """Gates of DiT-XL/2 for images of `size` pixels a side, from the folder of its repository."""
    folder = f"dit_xl2_{size}"
    c = trained_gates()
    c.base = f"{folder}/transformer"
    c.data = ConfigDict({"source": "tfds", "name": "imagenet2012", "crop": "centre", "flip": "random", "workers": 16})
    codec = {"kind": "autoencoder", "autoencoder": {"preset": "sd1"}, "workdir": f"{folder}/vae"}
    label = {"classes": 1000, "width": 1152}
    c.inputs = ConfigDict({"kind": "class_labels", "image_sizes": ((size, size),), "codec": codec, "label": label})
    c.inputs.label_dropout = 0.1
    c.network = ConfigDict({"kind": "dit", "preset": "xl_2", "remat": "block"})
    c.prediction = "eps"
    c.schedule = ConfigDict({"kind": "vp", "preset": "dit"})
    c.sampling = ConfigDict({"steps": 50, "guidance": 1.5})
    return c


def shortened(c: ConfigDict) -> ConfigDict:
    """Six updates of gates for four steps."""
    c.train_steps = 6
    c.batch_size = 8
    c.log_every_steps = 2
    c.sampling.steps = 4
    c.checkpoint.every_steps = 3
    return c


def run_locally(c: ConfigDict) -> ConfigDict:
    """The same gates as small as can be: scanned digits, and a tiny DiT."""
    c = shortened(c)
    c.data = ConfigDict({"source": "digits"})
    codec = {"kind": "patch", "patch": 2, "scale": 1.5, "shift": -0.4}
    label = {"classes": 10, "width": 16}
    c.inputs = ConfigDict({"kind": "class_labels", "image_sizes": ((16, 16),), "codec": codec, "label": label})
    c.network = ConfigDict({"kind": "dit", "preset": "smoke", "latent_channels": 12})
    return c


def base_of(c: ConfigDict) -> ConfigDict:
    """The run that such small gates are of."""
    c.recipe = "flow_matching"
    for name in ("base", "rho_attention", "rho_ffn"):
        del c[name]
    c.optimizer = ConfigDict({"learning_rate": 3e-3, "warmup_steps": 2})
    c.ema_decay = 0.9
    return c


def check(arg: str | None) -> None:
    """Raises `ValueError` for an argument that there is not."""
    if arg not in (None, "runlocal", "runlocal,base"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or runlocal,base, or nothing")


def experiment(size: int, arg: str | None) -> ConfigDict:
    """The gates of `size` pixels, or the small form that `arg` names."""
    check(arg)
    c = gates(size)
    if arg is None:
        return c
    return base_of(run_locally(c)) if "base" in arg else run_locally(c)


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "runlocal" for six updates of tiny gates on a laptop; or "runlocal,base" for the run they are of."""
    return experiment(256, arg)
