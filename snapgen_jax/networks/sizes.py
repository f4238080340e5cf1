"""Sizes of images and of their latents."""

from __future__ import annotations


def height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a square image, given by its side, or of any."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def reduced(image_size: int | tuple[int, int], factor: int) -> tuple[int, int]:
    """(h, w) of the latents of a square or (H, W) image, `factor` times smaller; raises if a side does not divide."""
    height, width = height_width(image_size)
    if height % factor or width % factor:
        raise ValueError(f"an image of {height} x {width} px: both sides must be multiples of {factor}; change them")
    return height // factor, width // factor
