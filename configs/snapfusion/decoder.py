"""SnapFusion's decoder at full size: that of Stable Diffusion 1.5 with half of its channels, 12.4M parameters of 49.5M.

    snapgen plan  --config=configs/snapfusion/decoder.py --topology=v5e:4x4
    snapgen train --config=configs/snapfusion/decoder.py --workdir=gs://BUCKET/decoder --config.data.path=PHOTOS \
        --config.init_from=sd15/vae --config.generator_workdir=gs://BUCKET/sd15_v
    snapgen export --workdir=gs://BUCKET/eight --decoder=gs://BUCKET/decoder
    snapgen train --config=configs/shapes/autoencoder.py:runlocal --workdir=/tmp/autoencoder
    snapgen train --config=configs/snapfusion/decoder.py:runlocal --workdir=/tmp/decoder \
        --config.inputs.codec.workdir=/tmp/autoencoder --config.init_from=/tmp/autoencoder

Its latents are drawn from the captions of PHOTOS by `sd15_v`, the run of `configs/snapfusion/robust.py` that predicts
v, in 50 steps from fresh noise (section 3.3 of arXiv 2306.00980); the whole decoder's image of a crop is what to make.
It starts as the channels of the whole decoder whose weights are largest. The runlocal form has no generator.

Machine: 16 chips of TPU v5e; nearly all of an update is drawing. Metric: `loss`, the squared error to the whole
decoder's pixels in [-1, 1]. The paper says neither length, batch nor learning rate. Not run yet.
"""

from ml_collections import ConfigDict

from configs.snapfusion import robust


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for six updates of a tiny decoder on a laptop."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    drawing = robust.experiment("sd15")
    c = ConfigDict()
    c.recipe = "decoder_distillation"
    c.train_steps = 50_000
    c.batch_size = 64
    c.log_every_steps = 100
    c.crop = 256
    c.data = drawing.data
    c.inputs = ConfigDict({"kind": "images", "image_sizes": ((512, 512),), "codec": drawing.inputs.codec.to_dict()})
    c.decoder = ConfigDict({"kind": "pruned_decoder", "preset": "sd1", "keep": 0.5})
    c.target = "large"
    c.generator = ConfigDict({k: drawing[k] for k in ("network", "inputs", "prediction", "schedule", "sampling")})
    c.generator_workdir = "sd15_v"
    c.generated_share = 1.0
    c.loss = ConfigDict({"l1": 0.0, "l2": 1.0, "perceptual": 0.0, "adversarial": 0.0})
    c.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 500, "weight_decay": 0.0})
    c.ema_decay = 0.999
    c.mesh = ConfigDict({"fsdp": 16})
    c.checkpoint = ConfigDict({"every_steps": 1_000})
    c.evaluation = ConfigDict({"every_steps": 5_000, "during": ("reconstruction",), "final": ("reconstruction",)})
    if arg == "runlocal":
        tiny = {"preset": "smoke", "normalisation": "measured"}  # as `configs/shapes/autoencoder.py:runlocal` trains it
        c.train_steps = 6
        c.batch_size = 8
        c.log_every_steps = 2
        c.crop = 8
        c.data = ConfigDict({"source": "synthetic"})
        c.inputs.image_sizes = ((16, 16),)
        c.inputs.codec = ConfigDict({"kind": "autoencoder", "autoencoder": dict(tiny), "workdir": ""})
        c.decoder = ConfigDict({"kind": "pruned_decoder", "autoencoder": dict(tiny)})
        c.generator_workdir = ""
        c.optimizer.warmup_steps = 2
        c.mesh = ConfigDict({"fsdp": 1})
        c.checkpoint.every_steps = 3
        c.evaluation.every_steps = 0
    return c
