"""The student of the shapes world by itself: the quickstart's UNet, conditioned on the frozen text encoder.

    snapgen train --config=configs/shapes/student.py --workdir=runs/student --config.inputs.text_workdir=runs/clip \
        --config.inputs.codec.workdir=runs/autoencoder

A stage of `chain.py`: what distillation has to better at as many updates. It draws latents of `autoencoder.py`; its
short forms, patches of pixels as the quickstart does. Machine: one GPU, or two CPU cores for an hour. Metric:
`score.overall`.
"""

from ml_collections import ConfigDict

from configs.shapes import clip, quickstart


def codec(arg: str | None) -> ConfigDict:
    """The latents of the whole chain: the autoencoder's, or in the short forms patches of pixels."""
    if arg:
        return ConfigDict({"kind": "patch", "patch": 4})
    return ConfigDict({"kind": "autoencoder", "autoencoder": {"preset": "shapes"}, "workdir": "runs/autoencoder"})


def latent_channels(arg: str | None) -> int:
    """Of these latents; they have equally many rows and columns."""
    return 48 if arg else 8


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`."""
    c = quickstart.get_config("runlocal" if arg == "runlocal" else None)
    c.data = clip.data(arg)
    c.inputs.text = clip.text(arg)
    c.inputs.text_workdir = "runs/clip"
    c.train_steps = {"quick": 3_000, "runlocal": 6}.get(arg or "", 34_400)
    c.evaluation.final = ("validation_loss",)
    c.inputs.codec = codec(arg)
    c.network.latent_channels = latent_channels(arg)
    return c
