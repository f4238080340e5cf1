"""Stable Diffusion 1.5, drawing by itself.

    snapgen sample --config=configs/teacher/sd15.py --weights=DIR --prompt="a red fox in the snow"

DIR is the folder that `hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir DIR` makes
(CreativeML Open RAIL-M). Files in float16 alone (`*.fp16.safetensors`) do as well.

Machine: any with 5 GB of memory for parameters in float32 (the UNet 3.4 GB).
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for 64 px in 4 steps of whatever size the folder holds."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.system = "sd"
    c.size = "sd15"
    c.image_size = (512, 512)
    c.steps, c.guidance = 30, 7.5
    if arg == "runlocal":
        c.size = "any"
        c.image_size = (64, 64)
        c.steps = 4
    return c
