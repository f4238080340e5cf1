"""Stable Diffusion XL base 1.0, drawing by itself.

    snapgen sample --config=configs/teacher/sdxl.py --weights=DIR --prompt="a red fox in the snow"

DIR is the folder that `hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir DIR` makes
(CreativeML Open RAIL++-M). Files in float16 alone (`*.fp16.safetensors`) do as well.

Machine: any with 14 GB of memory for parameters in float32 (the UNet 10.3 GB), half in bfloat16.
"""

from ml_collections import ConfigDict

from configs.teacher import sd15


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `sd15.py`."""
    c = sd15.get_config(arg)
    c.guidance = 5.0
    if arg is None:
        c.size = "sdxl"
        c.image_size = (1024, 1024)
    return c
