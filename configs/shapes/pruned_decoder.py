"""SnapFusion's decoder in the shapes world: the autoencoder's with half of its channels, on latents that are drawn.

    snapgen train --config=configs/shapes/autoencoder.py --workdir=runs/autoencoder
    snapgen train --config=configs/shapes/pruned_decoder.py:generator --workdir=runs/generator \
        --config.inputs.codec.workdir=runs/autoencoder
    snapgen train --config=configs/shapes/pruned_decoder.py --workdir=runs/pruned \
        --config.inputs.codec.workdir=runs/autoencoder --config.init_from=runs/autoencoder \
        --config.generator_workdir=runs/generator
    snapgen export --workdir=runs/generator --decoder=runs/pruned

The decoder starts as the channels of the large one whose weights are largest, and learns to decode what the generator
draws from captions, from fresh noise each time. `docs/snapfusion.md` says more.

Machine: two CPU cores. Time: ten minutes for each of the first two, fifteen for the third, most of which is drawing.
Metric: `loss`, the squared error to the large decoder's images; `reconstruction.tiny.psnr` beside
`reconstruction.large.psnr`.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base, autoencoder

FORMS = ("generator", "quick_generator", "runlocal_generator", "quick", "runlocal")


def generator(arg: str | None) -> ConfigDict:
    """The run that draws: the base of `adapters_base.py`, on latents of the autoencoder."""
    c = adapters_base.get_config(arg)
    small = arg == "runlocal"
    network = ConfigDict(autoencoder.get_config("runlocal" if small else None).autoencoder)
    c.inputs.codec = ConfigDict({"kind": "autoencoder", "autoencoder": network, "workdir": "runs/autoencoder"})
    c.network.latent_channels = 4 if small else 8
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "generator" for the run that draws; "quick" and "quick_generator", on single objects; or "runlocal"
    and "runlocal_generator" for runs of a few seconds, after that of `autoencoder.py`."""
    if arg not in (None, *FORMS):
        raise ValueError(f"unknown argument {arg!r}; the arguments are {', '.join(FORMS)}, or nothing")
    if arg and arg.endswith("generator"):
        return generator(arg.removesuffix("generator").rstrip("_") or None)
    drawing = generator(arg)
    c = ConfigDict()
    c.recipe = "decoder_distillation"
    c.train_steps = 1_000
    c.batch_size = 16
    c.log_every_steps = 100
    c.init_from = "runs/autoencoder"
    c.data = drawing.data
    c.inputs = ConfigDict({"kind": "images", "image_sizes": ((32, 32),), "codec": drawing.inputs.codec.to_dict()})
    c.decoder = ConfigDict({"kind": "pruned_decoder", "keep": 0.5})
    c.decoder.autoencoder = ConfigDict(drawing.inputs.codec.autoencoder.to_dict())
    c.target = "large"
    c.generator = ConfigDict({name: drawing[name] for name in ("network", "inputs", "prediction", "sampling")})
    c.generator.sampling.steps = 8
    c.generator_workdir = "runs/generator"
    c.generated_share = 1.0
    c.loss = ConfigDict({"l1": 0.0, "l2": 1.0, "perceptual": 0.0, "adversarial": 0.0})
    c.optimizer = ConfigDict({"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50})
    c.ema_decay = 0.98
    c.checkpoint = ConfigDict({"every_steps": 250})
    c.evaluation = ConfigDict({"every_steps": 500, "during": ("reconstruction",), "final": ("reconstruction",)})
    if arg == "runlocal":
        c.train_steps = 8
        c.batch_size = 4
        c.log_every_steps = 4
        c.generator.sampling.steps = 2
        c.optimizer.warmup_steps = 2
        c.checkpoint.every_steps = 4
        c.evaluation.every_steps = 0
    return c
