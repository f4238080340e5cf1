"""The detector names what is drawn, and nothing that is not."""

import time
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from snapgen_jax.data.prompts import CATEGORIES
from snapgen_jax.data.shapes import COLOURS, KINDS, Scene, SceneObject, render
from snapgen_jax.data.shapes_grammar import sample_scene
from snapgen_jax.evaluation.detector import UNKNOWN, detect
from snapgen_jax.evaluation.detector_validation import validate_detector


def picture(*objects: SceneObject, size: int = 32, background: int = 240) -> np.ndarray:
    return render(Scene(objects, (), "single_object", background=background), size)


def polygon(points: list[tuple[float, float]], size: int = 64) -> np.ndarray:
    """A red polygon over the middle half of the picture, anti-aliased."""
    canvas = Image.new("RGB", (8 * size, 8 * size), (240, 240, 240))
    corners = [(4 * size + 2 * size * x, 4 * size + 2 * size * y) for x, y in points]
    ImageDraw.Draw(canvas).polygon(corners, fill=COLOURS["red"])
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def as_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def numbers() -> dict[int, Mapping[str, float]]:
    return {32: validate_detector(32), 64: validate_detector(64, per_category=32)}


@pytest.mark.parametrize("size", [32, 64])
def test_true_renders_are_accepted_in_every_category(numbers, size):
    assert numbers[size]["detector.accuracy"] >= 0.995
    assert all(numbers[size][f"detector.accuracy.{category}"] >= 0.98 for category in CATEGORIES)


@pytest.mark.parametrize("size", [32, 64])
def test_permuted_captions_score_near_nothing(numbers, size):
    assert 0.02 < numbers[size]["detector.chance"] < 0.10


@pytest.mark.parametrize(
    "adversary", ["wrong_shape", "wrong_colours", "swapped_colours", "surplus", "blurred", "merged"]
)
@pytest.mark.parametrize("size", [32, 64])
def test_adversaries_are_refused(numbers, size, adversary):
    assert numbers[size][f"detector.accepts.{adversary}"] == 0.0


@pytest.mark.parametrize("size", [32, 48, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_colour_is_named_and_placed(size, kind):
    for colour in COLOURS:
        drawn = SceneObject(kind, colour, 0.3, 0.41, 0.57)
        (found,) = detect(picture(drawn, size=size))
        assert (found.kind, found.colour) == (kind, colour)
        assert np.allclose((found.x, found.y, found.size), (drawn.x, drawn.y, drawn.size), atol=0.01)


def test_area_is_that_of_the_object():
    (found,) = detect(picture(SceneObject("circle", "blue", 0.5, 0.5, 0.5), size=64))
    assert found.area == pytest.approx(np.pi * 0.25**2, rel=0.02)


def test_objects_one_pixel_apart_are_two():
    objects = SceneObject("square", "red", 0.4, 0.27, 0.5), SceneObject("square", "red", 0.4, 0.69, 0.5)
    assert [o.kind for o in detect(picture(*objects))] == ["square", "square"]


def test_touching_objects_of_two_colours_are_two():
    objects = SceneObject("circle", "red", 0.4, 0.3, 0.5), SceneObject("square", "blue", 0.4, 0.67, 0.5)
    assert {(o.kind, o.colour) for o in detect(picture(*objects, size=64))} == {("circle", "red"), ("square", "blue")}


@pytest.mark.parametrize("background", [200, 255])
def test_the_background_is_found_in_the_picture(background):
    (found,) = detect(picture(SceneObject("star", "cyan", 0.5, 0.5, 0.5), background=background))
    assert (found.kind, found.colour) == ("star", "cyan")


@pytest.mark.parametrize("size", [32, 64])
def test_mild_noise_and_blur_change_nothing(size):
    rng = np.random.default_rng(0)
    right = 0
    for _ in range(60):
        scene = sample_scene(rng)
        image = render(scene, size).astype(np.float32)
        soft = ndimage.gaussian_filter(image, (size / 80, size / 80, 0))
        found = detect(as_bytes(soft + rng.normal(0, 12, soft.shape)))
        right += sorted((o.kind, o.colour) for o in found) == sorted((o.kind, o.colour) for o in scene.objects)
    assert right >= 59


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("diamond", [(0, -1), (1, 0), (0, 1), (-1, 0)]),
        ("flat oval", [(np.cos(a), 0.7 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 60)]),
        ("long rectangle", [(-1, -0.7), (1, -0.7), (1, 0.7), (-1, 0.7)]),
        ("triangle upside down", [(-1, -0.8), (1, -0.8), (0, 1)]),
        ("half disc", [(np.cos(a), np.sin(a)) for a in np.linspace(0, np.pi, 40)]),
        ("diagonal cross", [(0.2 * x, 0.2 * y) for x, y in [(0, -1), (3, -4), (4, -3), (1, 0), (4, 3), (3, 4)]]
         + [(0.2 * x, 0.2 * y) for x, y in [(0, 1), (-3, 4), (-4, 3), (-1, 0), (-4, -3), (-3, -4)]]),
        ("letter L", [(-1, -1), (-0.3, -1), (-0.3, 0.3), (1, 0.3), (1, 1), (-1, 1)]),
    ],
)  # fmt: skip
def test_what_is_no_kind_is_unknown(name, points):
    assert [(o.kind, o.colour) for o in detect(polygon(points))] == [(UNKNOWN, "red")], name


def test_a_colour_without_a_name_is_unknown():
    pink = np.where(picture(SceneObject("circle", "black", 0.5, 0.5, 0.5)) < 128, (250, 90, 190), (240, 240, 240))
    (found,) = detect(pink.astype(np.uint8))
    assert (found.kind, found.colour) == ("circle", UNKNOWN)


def test_a_ghost_counts_as_an_object():
    clear = picture(SceneObject("circle", "red", 0.36, 0.27, 0.5)).astype(np.float32)
    ghost = picture(SceneObject("circle", "red", 0.36, 0.73, 0.5)).astype(np.float32)
    found = detect(as_bytes(clear + 0.4 * (ghost - 240)))
    assert [o.kind for o in found] == ["circle", UNKNOWN]


@pytest.mark.parametrize("shade", [0, 128, 240])
def test_a_blank_picture_shows_nothing(shade):
    assert detect(np.full((32, 32, 3), shade, np.uint8)) == []


@pytest.mark.filterwarnings("error")
def test_noise_shows_nothing_that_has_a_name():
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        assert {o.kind for o in detect(noise)} <= {UNKNOWN}


def test_four_hundred_pictures_take_a_few_seconds_at_most():
    rng = np.random.default_rng(0)
    images = [render(sample_scene(rng), 32) for _ in range(100)]
    start = time.process_time()
    for image in images:
        detect(image)
    assert 4 * (time.process_time() - start) < 5.0


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.float32), np.zeros((32, 48, 3), np.uint8)])
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="the detector reads uint8"):
        detect(image)
