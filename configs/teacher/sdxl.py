"""Stable Diffusion XL base 1.0, drawing by itself.

    snapgen sample --config=configs/teacher/sdxl.py --weights=DIR --prompt="a red fox in the snow"

DIR is the folder that `hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir DIR` makes
(CreativeML Open RAIL++-M). Files in float16 alone (`*.fp16.safetensors`) do as well.

Machine: any with 14 GB of memory for parameters in float32 (the UNet 10.3 GB), half in bfloat16.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for 64 px in 4 steps of whatever size the folder holds."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.system = "sd"
    c.size = "sdxl"
    c.image_size = (1024, 1024)
    c.steps, c.guidance = 30, 5.0
    if arg == "runlocal":
        c.size = "any"
        c.image_size = (64, 64)
        c.steps = 4
    return c
