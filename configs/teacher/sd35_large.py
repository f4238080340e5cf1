"""Stable Diffusion 3.5 Large, SnapGen's teacher, drawing by itself.

    snapgen sample --config=configs/teacher/sd35_large.py --weights=DIR --prompt="a red fox in the snow"
    snapgen sample --config=configs/teacher/sd35_large.py:turbo --weights=DIR --prompt="a red fox in the snow"

DIR is the folder that `hf download stabilityai/stable-diffusion-3.5-large --local-dir DIR` makes (the repository is
gated, Stability AI Community License); `:turbo` wants that of `stable-diffusion-3.5-large-turbo`.

Machine: any accelerator, or slice, with 30 GB of memory for parameters (bfloat16: the MMDiT takes 16.1 GB, T5-XXL 9.5).
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, "turbo" for the model distilled to 4 steps without guidance, or "runlocal" for 64 px in 4 steps of
    whatever size the folder holds."""
    if arg not in (None, "turbo", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are turbo and runlocal, or nothing")
    c = ConfigDict()
    c.system = "sd35"
    c.size = "sd35_large"
    c.image_size = (1024, 1024)
    c.steps, c.guidance, c.shift = 28, 3.5, 3.0
    if arg == "turbo":
        c.size = "sd35_large_turbo"
        c.steps, c.guidance = 4, 1.0
    if arg == "runlocal":
        c.size = "any"
        c.image_size = (64, 64)
        c.steps = 4
    return c
