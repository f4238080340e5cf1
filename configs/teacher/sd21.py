"""Stable Diffusion 2.1, drawing by itself.

    snapgen sample --config=configs/teacher/sd21.py --weights=DIR --prompt="a red fox in the snow"

DIR is the folder that `hf download stabilityai/stable-diffusion-2-1 --local-dir DIR` makes
(CreativeML Open RAIL++-M). Files in float16 alone (`*.fp16.safetensors`) do as well.

Machine: any with 6 GB of memory for parameters in float32 (the UNet 3.5 GB).
"""

from ml_collections import ConfigDict

from configs.teacher import sd15


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `sd15.py`."""
    c = sd15.get_config(arg)
    if arg is None:
        c.size = "sd21"
        c.image_size = (768, 768)
    return c
