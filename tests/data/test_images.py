"""Files of every common kind decode to upright RGB."""

import io

import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data import images
from snapgen_jax.data.errors import UnreadableExampleError
from snapgen_jax.data.images import decode, header_size


def _quadrants() -> Image.Image:
    """40x30, and no two corners alike."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15, :20], pixels[:15, 20:], pixels[15:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def _saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_formats_decode_to_the_same_picture(file_format: str) -> None:
    options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
    decoded = decode(_saved(_quadrants(), file_format, **options))
    assert decoded.shape == (30, 40, 3) and decoded.dtype == np.uint8
    tolerance = 60 if file_format in ("WEBP", "JPEG") else 0
    assert np.abs(decoded[::29, ::39].astype(int) - np.asarray(_quadrants())[::29, ::39]).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_colour_modes_decode_to_rgb(mode: str) -> None:
    grey = Image.fromarray(np.full((8, 8), 200, np.uint8))
    image = Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)) if mode == "I;16" else grey.convert(mode)
    decoded = decode(_saved(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert decoded.shape == (8, 8, 3)
    if mode != "1":
        assert np.abs(decoded.astype(int) - 200).max() <= 1


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, :2] = (255, 0, 0, 255)
    decoded = decode(_saved(Image.fromarray(pixels), "PNG"))
    assert (decoded[:, :2] == (255, 0, 0)).all() and (decoded[:, 2:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int, tmp_path) -> None:
    upright = np.asarray(_quadrants())
    # What a camera stores, by EXIF orientation: the operation that the tag undoes.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    np.testing.assert_array_equal(decode(path), upright)
    assert header_size(path) == (30, 40)


def test_damaged_missing_and_foreign_files_are_unreadable(tmp_path, monkeypatch) -> None:
    whole = _saved(_quadrants(), "JPEG")
    cases = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not an image",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }
    for name, content in cases.items():
        with pytest.raises(UnreadableExampleError):
            decode(content)
        (tmp_path / name).write_bytes(content)
    assert header_size(tmp_path / "text") == (0, 0)
    with pytest.raises(UnreadableExampleError, match="FileNotFoundError"):
        decode(tmp_path / "missing.jpg")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(UnreadableExampleError, match="40x30 pixels are more"):
        decode(_saved(_quadrants(), "PNG"))
