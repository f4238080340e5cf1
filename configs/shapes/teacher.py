"""The teacher of the shapes world, four times as large as the student: an MMDiT, trained by flow matching.

    snapgen train --config=configs/shapes/teacher.py --workdir=runs/teacher --config.inputs.text_workdir=runs/clip \
        --config.inputs.codec.workdir=runs/autoencoder

A stage of `chain.py`, after `clip.py`; on the same latents as `student.py`. In its shortest form a UNet of twice the
width of the student's: an MMDiT knows nothing yet after the minutes that two cores have for it (0.016 after 2,000
updates, where chance is 0.07), and there is nothing to learn from it.

Machine: one GPU, or two CPU cores for some hours. Metric: `score.overall`.
"""

from ml_collections import ConfigDict

from configs.shapes import clip, quickstart, student


def architecture(arg: str | None) -> ConfigDict:
    """The network, which the distillation names too."""
    if arg == "quick":
        wide = student.get_config(arg).network
        wide.channels = tuple(2 * width for width in wide.channels)
        return wide
    channels = student.latent_channels(arg)
    shape = {"latent_channels": channels, "patch": 1, "position_size": 8, "position_base": 8, "text_mask": "attend"}
    if arg == "runlocal":
        return ConfigDict({"kind": "mmdit", "preset": "smoke", **shape, "dual": 0, "depth": 2})
    size = {"depth": 6, "heads": 4, "head_dim": 32}
    return ConfigDict({"kind": "mmdit", **shape, **size, "context_width": 64, "pooled_width": 64, "remat": "none"})


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`."""
    c = quickstart.get_config("runlocal" if arg == "runlocal" else None)
    c.network = architecture(arg)
    c.data = clip.data(arg)
    c.inputs.text = clip.text(arg)
    c.inputs.text_workdir = "runs/clip"
    c.train_steps = {"quick": 4_000, "runlocal": 6}.get(arg or "", 60_000)
    c.optimizer.learning_rate = 2e-3
    c.evaluation.final = ("validation_loss",)
    c.inputs.codec = student.codec(arg)
    return c
