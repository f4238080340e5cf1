"""Files of every common kind decode to upright RGB."""

import io
import struct

import numpy as np
import PIL
import pytest
from PIL import Image

from snapgen_jax.data import images
from snapgen_jax.data.errors import UnreadableExampleError
from snapgen_jax.data.images import decode, header_size

# Before 13, which Apache Beam holds back, Pillow does not read TIFF files of YCbCr and of premultiplied grey.
OLDER_PILLOW = int(PIL.__version__.split(".")[0]) < 13


def _quadrants() -> Image.Image:
    """40x30, and no two corners alike."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15, :20], pixels[:15, 20:], pixels[15:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def _saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _assert_refused(file: bytes) -> None:
    with pytest.raises(UnreadableExampleError):
        decode(file)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_formats_decode_to_the_same_picture(file_format: str) -> None:
    options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
    decoded = decode(_saved(_quadrants(), file_format, **options))
    assert decoded.shape == (30, 40, 3) and decoded.dtype == np.uint8
    tolerance = 60 if file_format in ("WEBP", "JPEG") else 0
    assert np.abs(decoded[::29, ::39].astype(int) - np.asarray(_quadrants())[::29, ::39]).max() <= tolerance


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        *(("PNG", mode) for mode in ("L", "1", "P", "RGBA", "LA")),
        *(("TIFF", mode) for mode in ("L", "1", "P", "RGBA", "LA", "CMYK", "PA", "RGBX", "YCbCr")),
        ("JPEG", "CMYK"),
    ],
)
def test_colour_modes_decode_to_rgb(file_format: str, mode: str) -> None:
    ramp = np.array([[0, 51, 204, 255]], np.uint8)
    image = Image.fromarray(ramp).convert("RGBA" if mode == "PA" else "RGB").convert(mode, dither=Image.Dither.NONE)
    file = _saved(image, file_format, **({"quality": 100} if file_format == "JPEG" else {}))
    if OLDER_PILLOW and (file_format, mode) == ("TIFF", "YCbCr"):
        _assert_refused(file)
        return
    decoded = decode(file)
    expected = np.where(ramp > 127, 255, 0) if mode == "1" else ramp
    assert np.abs(decoded.astype(int) - expected[..., None]).max() <= (3 if file_format == "JPEG" else 1)


def _tiff(array: np.ndarray, bits: int, *, kind: int = 1, photometric: int = 1, extra: int | None = None) -> bytes:
    """A TIFF file `[h, w]` or `[h, w, C]`; `kind` 1 is unsigned, 2 signed and 3 float; 0 is white in photometric 0."""
    height, width = array.shape[:2]
    channels = array.shape[2] if array.ndim == 3 else 1
    data = array.tobytes()
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in array.ravel())
        data = bytes(int(packed[n : n + 8].ljust(8, "0"), 2) for n in range(0, len(packed), 8))
    assert channels <= 2 and data, "two numbers fit into a tag itself"
    both = bits if channels == 1 else bits << 16 | bits
    tags = [(256, 1, width), (257, 1, height), (258, channels, both), (259, 1, 1), (262, 1, photometric), (273, 1, 8)]
    tags += [(277, 1, channels), (278, 1, height), (279, 1, len(data))]
    tags += [(339, 1, kind)]
    tags += [] if extra is None else [(338, 1, extra)]
    entries = b"".join(struct.pack("<HHII", tag, 3, count, value) for tag, count, value in sorted(tags))
    padded = data + b"\0" * (len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("brightest", [1, 0.01])
def test_grey_levels_are_told_by_the_format_and_not_by_the_brightest_pixel(brightest: float) -> None:
    levels = np.array([[0, 0.25, 0.5, 0.75, 1]]) * brightest
    sixteen, twelve = (np.rint(levels * white).astype(np.uint16) for white in (65535, 4095))
    files = {
        "floats": _saved(Image.fromarray(levels.astype(np.float32)), "TIFF"),
        "floats of a negative": _tiff(1 - levels.astype(np.float32), 32, kind=3, photometric=0),
        "16 bits in PNG": _saved(Image.fromarray(sixteen), "PNG"),
        "16 bits in TIFF": _saved(Image.fromarray(sixteen), "TIFF"),
        "16 bits of a negative": _tiff(65535 - sixteen, 16, photometric=0),
        "12 bits in TIFF": _tiff(twelve, 12),
        "8 bits": _saved(Image.fromarray(np.rint(levels * 255).astype(np.uint8)), "TIFF"),
        "8 bits of a negative": _tiff(255 - np.rint(levels * 255).astype(np.uint8), 8, photometric=0),
    }
    for name, file in files.items():
        decoded = decode(file).astype(int)
        assert decoded.shape == (1, 5, 3), name
        assert np.abs(decoded - levels[..., None] * 255).max() <= 0.51, name


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (_tiff(np.array([[0, 1, 255, 65535]], np.int32), 32, kind=2), "nothing says which of them is white"),
        (_tiff(np.array([[0, 1, 2**32 - 1]], np.uint32), 32), "nothing says which of them is white"),
        (_tiff(np.array([[-1000, 0, 3000]], np.int16), 16, kind=2), "nothing says which of them is white"),
        (_tiff(np.array([[-100, 0, 100]], np.int8), 8, kind=2), "nothing says which of them is white"),
        (_saved(Image.fromarray(np.array([[0, 128, 255]], np.float32)), "TIFF"), "floats from 0 to 255, .* white 1"),
        (_saved(Image.fromarray(np.array([[0, -1]], np.float32)), "TIFF"), "floats from -1 to 0"),
        (_saved(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"), "floats from nan"),
        (_saved(Image.new("LAB", (2, 2)), "TIFF"), "mode LAB; save it as grey or RGB"),
    ],
)
def test_numbers_whose_colours_nothing_tells_are_refused(file: bytes, message: str) -> None:
    with pytest.raises(UnreadableExampleError, match=message):
        decode(file)


def test_transparent_grey_is_laid_on_white() -> None:
    pixels = np.array([[[100, 255], [100, 0], [0, 128]]], np.uint8)
    assert decode(_saved(Image.fromarray(pixels), "PNG"))[0, :, 0].tolist() == [100, 255, 127]
    multiplied = np.array([[[100, 255], [0, 0], [0, 128]]], np.uint8)
    if OLDER_PILLOW:
        _assert_refused(_tiff(multiplied, 8, extra=1))
    else:
        assert decode(_tiff(multiplied, 8, extra=1))[0, :, 0].tolist() == [100, 255, 127]
    sixteen = np.array([[100 * 257, 7, 8]], np.uint16)
    with_one = _saved(Image.fromarray(sixteen), "PNG", transparency=7)
    assert decode(with_one)[0, :, 0].tolist() == [100, 255, 0]


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
    for name in ("photo.png", "photo.tif"):
        path = tmp_path / name
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        np.testing.assert_array_equal(decode(path), upright, err_msg=name)
        assert header_size(path) == (30, 40), name
    grey = np.ascontiguousarray(stored[..., 0])
    for wide in (grey, (grey.astype("<u2") * 257), (grey.astype(">u2") * 257)):
        Image.fromarray(wide).save(path, exif=exif)
        np.testing.assert_array_equal(decode(path)[..., 0], upright[..., 0])
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
