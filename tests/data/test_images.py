"""Files of every common kind decode to upright RGB, and images of any shape fill a bucket."""

import io

import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data import images
from snapgen_jax.data.errors import UnreadableExampleError
from snapgen_jax.data.images import decode, fit, header_size


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


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


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (64, 24), (30, 40)])
def test_fit_covers_the_bucket_without_stretching(size: tuple[int, int]) -> None:
    y, x = np.mgrid[:60, :80]
    image = np.stack([x * 3, y * 4, np.zeros_like(x)], axis=-1).astype(np.uint8)
    fitted = fit(image, size, _rng()).astype(float)
    assert fitted.shape == (*size, 3)
    # Red runs 3 levels a source column and green 4 a source row: equal steps of source pixels in both directions.
    columns = np.diff(fitted[size[0] // 2, 2:-2, 0]).mean() / 3
    rows = np.diff(fitted[2:-2, size[1] // 2, 1]).mean() / 4
    assert columns == pytest.approx(rows, rel=0.05)
    assert columns == pytest.approx(min(60 / size[0], 80 / size[1]), rel=0.05)


def test_centre_crop_keeps_the_centre_and_random_crops_move() -> None:
    image = np.repeat(np.arange(90, dtype=np.uint8)[None, :, None], 30, axis=0).repeat(3, axis=2)
    centre = fit(image, (30, 30), _rng())
    assert centre[0, 0, 0] == 30 and centre[0, -1, 0] == 59
    starts = {int(fit(image, (30, 30), np.random.default_rng(i), crop="random")[0, 0, 0]) for i in range(50)}
    assert min(starts) < 10 and max(starts) > 50


def test_flip_mirrors_every_other_image_and_nothing_else() -> None:
    image = np.asarray(_quadrants())
    results = [fit(image, (30, 40), np.random.default_rng(i), flip="random") for i in range(100)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert sum(np.array_equal(result, image) for result in results) == 100 - mirrored
    assert 30 < mirrored < 70
