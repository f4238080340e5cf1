"""Stable Video Diffusion: a photograph to a clip of 14 frames, written as numbered pictures.

    snapgen sample --config=configs/teacher/svd.py --weights=DIR --condition=image=photograph.jpg --out=clip/

DIR is the folder that `hf download stabilityai/stable-video-diffusion-img2vid --local-dir DIR` makes (the repository is
gated; read its licence there). Its files in float16 alone do as well.

Machine: an accelerator with 9 GB of memory for parameters in float32 (the UNet 6.1 GB), half in bfloat16.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for 3 frames of 32 px in 2 steps of whatever size the folder holds."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.system = "svd"
    c.size = "svd"
    c.image_size = (576, 1024)
    c.frames, c.steps = 14, 25
    c.first_guidance, c.guidance = 1.0, 3.0
    if arg == "runlocal":
        c.size = "any"
        c.image_size = (32, 32)
        c.frames, c.steps = 3, 2
    return c
