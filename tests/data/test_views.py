"""One crop and one flip for all pictures of an example, whatever their size, type and number of frames."""

import numpy as np
import pytest

from snapgen_jax.data.arrays import IMAGE, LABEL, TEXT, ArraySpec
from snapgen_jax.data.errors import UnreadableExampleError
from snapgen_jax.data.views import View, resize

DEPTH = ArraySpec("image", (None, None, 1), np.float32, "same", "area")


def _fit(image: np.ndarray, size: tuple[int, int], seed: int = 0, **options) -> np.ndarray:
    view = View.draw(image.shape[:2], size, np.random.default_rng(seed), **options)
    return view.show(IMAGE, image, size)


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (64, 24), (30, 40)])
def test_a_view_covers_the_bucket_without_stretching(size: tuple[int, int]) -> None:
    y, x = np.mgrid[:60, :80]
    image = np.stack([x * 3, y * 4, np.zeros_like(x)], axis=-1).astype(np.uint8)
    fitted = _fit(image, size).astype(float)
    assert fitted.shape == (*size, 3)
    # Red runs 3 levels a source column and green 4 a source row: equal steps of source pixels in both directions.
    columns = np.diff(fitted[size[0] // 2, 2:-2, 0]).mean() / 3
    rows = np.diff(fitted[2:-2, size[1] // 2, 1]).mean() / 4
    assert columns == pytest.approx(rows, rel=0.05)
    assert columns == pytest.approx(min(60 / size[0], 80 / size[1]), rel=0.05)


def test_centre_crop_keeps_the_centre_and_random_crops_move() -> None:
    image = np.repeat(np.arange(90, dtype=np.uint8)[None, :, None], 30, axis=0).repeat(3, axis=2)
    centre = _fit(image, (30, 30))
    assert centre[0, 0, 0] == 30 and centre[0, -1, 0] == 59
    starts = {int(_fit(image, (30, 30), seed, crop="random")[0, 0, 0]) for seed in range(50)}
    assert min(starts) < 10 and max(starts) > 50


def test_flip_mirrors_every_other_image_and_nothing_else() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    results = [_fit(image, (30, 40), seed, flip="random") for seed in range(100)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert sum(np.array_equal(result, image) for result in results) == 100 - mirrored
    assert 30 < mirrored < 70


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_companion_of_another_size_shows_the_same_part(mirrored: bool) -> None:
    # Both hold the x coordinate, from 0 to 200 over the picture's width.
    image = np.linspace(0, 200, 120)[None, :, None].repeat(60, axis=0).repeat(3, axis=2).round().astype(np.uint8)
    depth = np.linspace(0, 200, 41)[None, :, None].repeat(20, axis=0).astype(np.float32)  # 40.0 rounded up
    view = View((60, 120), (45.0, 0.0, 105.0, 60.0), mirrored)
    shown, deep = view.show(IMAGE, image, (30, 30)), view.show(DEPTH, depth, (15, 15))
    assert shown.shape == (30, 30, 3) and deep.shape == (15, 15, 1) and deep.dtype == np.float32
    pairs = shown[:, :, 0].reshape(15, 2, 15, 2).mean(axis=(1, 3))
    assert np.abs(pairs - deep[..., 0]).max() < 5, "less than one pixel of the depth map"
    assert (pairs[0, 0] > pairs[0, -1]) == mirrored


def test_a_companion_of_another_aspect_ratio_is_refused() -> None:
    view = View.draw((60, 120), (30, 30), np.random.default_rng(0))
    with pytest.raises(
        UnreadableExampleError, match="sizes 60x120 and 60x60; images of one example must show the same"
    ):
        view.show(DEPTH, np.zeros((60, 60, 1), np.float32), (30, 30))


def test_points_move_with_the_crop_and_the_flip() -> None:
    corners = np.array([[-1, -1], [1, 1], [0, 0]], np.float32)
    points = ArraySpec("points", (3, 2), np.float32, "negate_x")
    right_half = View((10, 20), (10.0, 0.0, 20.0, 10.0))
    assert right_half.show(points, corners, ()).tolist() == [[-3, -1], [1, 1], [-1, 0]]
    mirrored = View((10, 20), (10.0, 0.0, 20.0, 10.0), mirrored=True)  # the left half of the picture
    assert mirrored.show(points, corners, ()).tolist() == [[1, -1], [-3, 1], [-1, 0]]


def test_x_components_are_negated_where_the_picture_is_mirrored() -> None:
    flow = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    spec = ArraySpec("image", (None, None, 2), np.float32, "negate_x", "nearest")
    view = View((2, 3), (0.0, 0.0, 3.0, 2.0), mirrored=True)
    np.testing.assert_array_equal(view.show(spec, flow, (2, 3)), flow[:, ::-1] * [-1, 1])
    assert flow[0, 0, 1] == 1 and flow.min() == 0, "the source's own array is left as it is"
    label = np.int32(7)
    assert view.show(LABEL, label, ()) == 7 and view.show(TEXT, "a dot", ()) == "a dot"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float16"])
@pytest.mark.parametrize("resample", ["lanczos", "area"])
def test_images_of_any_type_and_channels_keep_their_type_and_range(dtype: str, resample) -> None:
    top = 255 if dtype == "uint8" else 60_000
    image = np.zeros((8, 8, 2), dtype)
    image[:, 4:, 1] = top
    small = resize(image, (2, 2), (0, 0, 8, 8), resample)
    assert small.dtype == dtype and (small[..., 0] == 0).all()
    assert small[:, 1, 1] == pytest.approx(top, rel=0.1) and small[:, 0, 1].astype(float).max() < 0.1 * top
    if resample == "area":
        assert (small[..., 1] == [0, top]).all(), "the mean of the pixels covered, and no overshoot"


def test_nearest_never_mixes_values() -> None:
    image = np.random.default_rng(0).choice([3, 70_001], (9, 7, 1)).astype(np.int64)
    resized = resize(image, (20, 5), (0.5, 1.0, 6.5, 9.0), "nearest")
    assert resized.shape == (20, 5, 1) and set(np.unique(resized)) == {3, 70_001}
    np.testing.assert_array_equal(resize(image, (9, 7), (0, 0, 7, 9), "nearest"), image)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "image", "shape": (None, None)}, r"\[h, w, C\] or \[F, h, w, C\], not of 2 axes"),
        ({"kind": "image", "shape": (None, None, None)}, "only the height and width of an image or"),
        ({"kind": "array", "shape": (None, 3)}, "only the height and width of an image or"),
        ({"kind": "points", "shape": (4, 2), "dtype": np.float32, "mirror": "same"}, "points are floats"),
        ({"kind": "points", "shape": (4, 3), "dtype": np.float32}, "points are floats"),
        ({"kind": "array", "shape": (2,), "dtype": np.uint8, "mirror": "negate_x"}, "signed numbers"),
        ({"kind": "image", "shape": (None, None, 1), "dtype": np.int32}, 'int32 can be resized with "nearest" alone'),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArraySpec(**fields)
