"""DiT-XL/2 (Peebles and Xie 2023) of ImageNet at 256 px, drawing by itself: classes, by number or by name.

    snapgen sample --config=configs/teacher/dit_xl2.py --weights=DIR --prompt="golden retriever"

DIR is the folder that `hf download facebook/DiT-XL-2-256 --local-dir DIR` makes (CC BY-NC 4.0). Where it holds a pickle
alone, `snapgen_jax/weights/maps/dit.py` says how to make a safetensors file of it once.

Machine: any with 4 GB of memory for parameters in float32 (the transformer 2.7 GB).
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for 16 px in 4 steps of whatever size the folder holds."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.system = "dit"
    c.size = "xl_2"
    c.image_size = (256, 256)
    c.steps, c.guidance = 50, 4.0
    if arg == "runlocal":
        c.size = "any"
        c.image_size = (16, 16)
        c.steps = 4
    return c
