"""Image files to arrays."""

from __future__ import annotations

import contextlib
import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from snapgen_jax.data.errors import UnreadableExampleError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Only formats that decode in Pillow itself: EPS, say, would run another program on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 1 << 27  # 134 megapixels: no camera makes more, and a decompression bomb does
_ORIENTATION = 0x0112  # EXIF tag
_BACKDROP = (255, 255, 255)  # behind transparent pixels
_BYTES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes that Pillow turns into RGB rightly
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_SIGNED, _WHITE_IS_ZERO = 2, 0  # values of the last two


def decode(file: str | os.PathLike[str] | BinaryIO | bytes) -> np.ndarray:
    """Reads an image file: uint8 RGB `[h, w, 3]`, upright, transparency laid on white, first frame of several.

    What is white is told by the format alone: 255, the largest number of 12 or 16 bits, or 1.0 of floats.

    Raises:
        UnreadableExampleError: the file is missing, damaged, of an unknown format, or too large to be a picture; or its
            format does not say which colours its numbers are.
    """
    try:
        with _opened(file) as stream, Image.open(stream, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
            white, negative = _white(image), _tiff(image, _PHOTOMETRIC) == _WHITE_IS_ZERO
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_to_rgb(upright if white is None else _in_bytes(upright, white, negative)))
    except Exception as error:  # Pillow's plug-ins raise nearly every type on damaged files
        raise UnreadableExampleError(f"{type(error).__name__}: {error}") from error


def format_of(data: bytes) -> str:
    """Pillow's name of an image file's format, "JPEG" also for a photograph with further pictures behind it.

    Raises:
        UnreadableExampleError: it is of no format that is read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return {"MPO": "JPEG"}.get(image.format or "", image.format or "")
    except UnidentifiedImageError:  # whose message holds an address in memory
        raise UnreadableExampleError(f"it is of none of the formats {', '.join(_FORMATS)}") from None
    except Exception as error:  # Pillow's plug-ins raise nearly every type on damaged files
        raise UnreadableExampleError(f"{type(error).__name__}: {error}") from error


def _opened(file: str | os.PathLike[str] | BinaryIO | bytes) -> contextlib.AbstractContextManager[BinaryIO]:
    """The file as a stream: given a path, Pillow maps some TIFF files into memory by the size after turning."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    return open(file, "rb") if isinstance(file, str | os.PathLike) else contextlib.nullcontext(file)


def _white(image: Image.Image) -> float | None:
    """The number that is white in a grey image of wide numbers, by its format; None for an image of bytes.

    Raises:
        ValueError: the format does not say.
    """
    if image.mode == "F":
        return 1.0
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return 2.0 ** _tiff(image, _BITS, 16) - 1
    if image.mode == "I" or _tiff(image, _SAMPLE_FORMAT) == _SIGNED:
        raise ValueError(
            "its pixels are signed or 32-bit integers, and nothing says which of them is white; save it with 8 or 16 "
            "unsigned bits, or as floats from 0 to 1"
        )
    if image.mode not in _BYTES:
        raise ValueError(f"its pixels are of the mode {image.mode}; save it as grey or RGB")
    return None


def _tiff(image: Image.Image, tag: int, default: int = -1) -> int:
    """The first value of a tag of a TIFF file; the default where it has none, and in other formats."""
    value = image.tag_v2.get(tag, default) if isinstance(image, TiffImagePlugin.TiffImageFile) else default
    return value[0] if isinstance(value, tuple) else value


def _in_bytes(image: Image.Image, white: float, negative: bool) -> Image.Image:
    """A grey image of wide numbers as one of bytes, with transparency where one number means that."""
    values = np.asarray(image, np.float64)
    if image.mode == "F" and not np.all((values >= 0) & (values <= white)):
        raise ValueError(
            f"its pixels are floats from {values.min():g} to {values.max():g}, and black is 0 and white 1; scale them, "
            "or save it with 8 or 16 bits"
        )
    grey = np.rint((white - values if negative else values) * (255.0 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(values == transparent, 0, 255).astype(np.uint8)], axis=-1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, (*_BACKDROP, 255))
        image = Image.alpha_composite(backdrop, image)
    return image.convert("RGB")


def header_size(file: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Height and width of an image file as it is shown, from its header alone; (0, 0) where it cannot be read."""
    try:
        with _opened(file) as stream, Image.open(stream, formats=_FORMATS) as image:
            # Of a TIFF file Pillow gives the size as it is shown.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # the pipeline names the file when it is drawn
        return (0, 0)
