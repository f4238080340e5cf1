"""SnapGen's decoder in the shapes world: it learns to decode what the autoencoder of an earlier run encodes.

    snapgen train --config=configs/shapes/autoencoder.py --workdir=runs/autoencoder
    snapgen train --config=configs/shapes/tiny_decoder.py --workdir=runs/tiny \
        --config.inputs.codec.workdir=runs/autoencoder
    snapgen evaluate --workdir=runs/tiny --names=reconstruction
    snapgen train --config=configs/shapes/tiny_decoder.py:generated --workdir=runs/tiny_generated \
        --config.inputs.codec.workdir=runs/autoencoder --config.generator_workdir=runs/student \
        --config.generator.inputs.text_workdir=runs/clip

In the last one half of the latents are not encoded images, but drawn by a run of `student.py` from captions, and the
large decoder's images are what to make of them.

Machine: two CPU cores. Time: about ten minutes. Metric: `reconstruction.tiny.psnr`; half as many updates reach 31.4 dB,
2.4 dB below `large` (`benchmarks/results/decoder.json`).
"""

from ml_collections import ConfigDict

from configs.shapes import student


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "generated" for latents of a trained generator, too; "runlocal" for a run of a few seconds, after
    that of `autoencoder.py`."""
    if arg not in (None, "generated", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are generated and runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "decoder_distillation"
    c.train_steps = 3_000
    c.batch_size = 16
    c.log_every_steps = 100
    c.data = ConfigDict({"source": "shapes", "shapes": {"size": 32}})
    codec = {"kind": "autoencoder", "autoencoder": {"preset": "shapes"}, "workdir": "runs/autoencoder"}
    c.inputs = ConfigDict({"kind": "images", "image_sizes": ((32, 32),), "codec": codec})
    c.decoder = ConfigDict({"preset": "shapes"})
    c.loss = ConfigDict({"l2": 1.0, "perceptual": 0.02, "adversarial": 0.05, "adversarial_from_steps": 1_500})
    c.perceptual = ConfigDict({"preset": "shapes"})  # a random network: no weights are needed
    c.discriminator = ConfigDict({"preset": "shapes"})
    c.optimizer = ConfigDict({"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 100})
    c.discriminator_optimizer = ConfigDict({"learning_rate": 2e-4, "warmup_steps": 0, "b1": 0.5})
    c.ema_decay = 0.995
    c.checkpoint = ConfigDict({"every_steps": 500})
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": ("reconstruction",), "final": ("reconstruction",)})
    if arg == "generated":
        drawing = student.get_config()
        used = ("network", "inputs", "prediction", "sampling")
        c.generator = ConfigDict({name: drawing[name] for name in used if name in drawing})
        c.generator_workdir = "runs/student"
        c.target = "large"
        c.data = drawing.data
    if arg == "runlocal":
        c.train_steps = 8
        c.batch_size = 4
        c.log_every_steps = 4
        c.inputs.codec.autoencoder = ConfigDict({"preset": "smoke", "normalisation": "measured"})
        c.decoder = ConfigDict({"preset": "smoke", "scale": 1.0, "shift": 0.0})
        c.perceptual = ConfigDict({"preset": "smoke"})
        c.discriminator = ConfigDict({"preset": "smoke"})
        c.loss.adversarial_from_steps = 4
        c.checkpoint.every_steps = 4
        c.evaluation.every_steps = 0
    return c
