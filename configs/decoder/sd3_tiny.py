"""SnapGen's decoder for the latents of Stable Diffusion 3: 1,380,163 parameters in place of 49,545,475.

    hf download stabilityai/stable-diffusion-3.5-large --include 'vae/*' --local-dir sd35
    snapgen plan  --config=configs/decoder/sd3_tiny.py --topology=v5e:4x4
    snapgen train --config=configs/decoder/sd3_tiny.py --workdir=gs://bucket/tiny \
        --config.inputs.codec.workdir=sd35/vae --config.data.path=PHOTOS --config.perceptual_weights=LPIPS
    snapgen train --config=configs/decoder/sd3_tiny.py:large_crops --workdir=gs://bucket/tiny_512 \
        --config.init_from=gs://bucket/tiny ...                          # the last tenth, on crops of 512 px
    snapgen train --config=configs/decoder/sd3_tiny.py:tfds ...          # COCO's images in place of a folder

PHOTOS is a folder of images, LPIPS one that `snapgen_jax/weights/maps/lpips.py` says how to make.

SnapGen names the terms of the loss and no weights. These are those of the autoencoder whose latents are decoded
(Rombach et al. 2022, appendix G: absolute differences and LPIPS with weight one, an adversary of 0.5 that joins later,
a constant learning rate). `--config.loss.l1=0 --config.loss.l2=1 --config.loss.perceptual=0.1` is the other common
choice.

Machine: a TPU v5e 4x4 slice; 270,000 steps of 256 crops of 256 px and 30,000 of 512 px, see `snapgen plan` for the
time. Metric: expect `reconstruction.tiny.psnr` one to two dB below `reconstruction.large.psnr`, and no colour shift.
Not run yet.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for a folder of images, "tfds" for COCO by TFDS, "large_crops" for the last tenth of the training, or
    "runlocal" for a few steps of small networks on whatever `data.path` and `inputs.codec.workdir` hold."""
    if arg not in (None, "tfds", "large_crops", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are tfds, large_crops and runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "decoder_distillation"
    c.train_steps = 270_000
    c.batch_size = 256
    c.crop = 256
    c.data = ConfigDict({"source": "folder", "path": "", "captions": "none", "flip": "random", "workers": 8})
    if arg == "tfds":
        c.data = ConfigDict({"source": "tfds", "name": "coco_captions", "validation_split": "val", "flip": "random"})
        c.data.workers = 8
    codec = {"kind": "autoencoder", "autoencoder": {"preset": "sd3"}, "workdir": ""}
    c.inputs = ConfigDict({"kind": "images", "image_sizes": ((512, 512),), "codec": codec})
    c.decoder = ConfigDict({"preset": "sd3"})
    c.loss = ConfigDict({"l1": 1.0, "l2": 0.0, "perceptual": 1.0, "adversarial": 0.5, "adversarial_from_steps": 60_000})
    c.perceptual = ConfigDict({"preset": "vgg16"})
    c.discriminator = ConfigDict({"preset": "patch70"})
    c.optimizer = ConfigDict({"learning_rate": 2e-4, "schedule": "constant", "warmup_steps": 1_000})
    c.discriminator_optimizer = ConfigDict({"learning_rate": 2e-4, "warmup_steps": 1_000, "b1": 0.5})
    c.ema_decay = 0.999
    c.checkpoint = ConfigDict({"every_steps": 2_000})
    c.evaluation = ConfigDict({"every_steps": 20_000, "during": ("reconstruction",), "final": ("reconstruction",)})
    if arg == "large_crops":
        c.train_steps = 30_000
        c.crop = 512
        c.inputs.image_sizes = ((1024, 1024),)
        c.loss.adversarial_from_steps = 0
        c.optimizer.warmup_steps = 100
        c.discriminator_optimizer.warmup_steps = 100
        c.evaluation.every_steps = 10_000
    if arg == "runlocal":
        c.train_steps = 4
        c.batch_size = 2
        c.log_every_steps = 2
        c.inputs.image_sizes = ((32, 32),)
        c.crop = 16
        c.data.workers = 0
        c.inputs.codec.autoencoder = ConfigDict({"preset": "smoke"})
        c.decoder = ConfigDict({"preset": "smoke"})
        c.perceptual = ConfigDict({"preset": "smoke"})
        c.discriminator = ConfigDict({"preset": "smoke"})
        c.loss.adversarial_from_steps = 2
        c.optimizer.warmup_steps = 1
        c.discriminator_optimizer.warmup_steps = 1
        c.checkpoint.every_steps = 2
        c.evaluation.every_steps = 0
    return c
