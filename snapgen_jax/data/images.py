"""Image files to arrays."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from snapgen_jax.data.errors import UnreadableExampleError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Only formats that decode in Pillow itself: EPS, say, would run another program on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 1 << 27  # 134 megapixels: no camera makes more, and a decompression bomb does
_ORIENTATION = 0x0112  # EXIF tag
_BACKDROP = (255, 255, 255)  # behind transparent pixels


def decode(file: str | os.PathLike[str] | BinaryIO | bytes) -> np.ndarray:
    """Reads an image file: uint8 RGB `[h, w, 3]`, upright, transparency laid on white, first frame of several.

    Raises:
        UnreadableExampleError: the file is missing, damaged, of an unknown format, or too large to be a picture.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's plug-ins raise nearly every type on damaged files
        raise UnreadableExampleError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey levels, which `convert` would clip
        grey = np.asarray(image, np.float64)
        scale = 255.0 / 65535.0 if grey.max(initial=0.0) > 255.0 else 1.0
        image = Image.fromarray(np.clip(np.rint(grey * scale), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, (*_BACKDROP, 255))
        image = Image.alpha_composite(backdrop, image)
    return image.convert("RGB")


def header_size(file: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image file as it is shown, from its header alone; (0, 0) where it cannot be read."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # the pipeline names the file when it is drawn
        return (0, 0)
