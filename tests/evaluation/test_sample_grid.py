"""Sample grids: the same prompts and noise at every step, as one picture with captions."""

import numpy as np
import pytest

from snapgen_jax.evaluation import sample_grid
from snapgen_jax.evaluation.pictures import (
    FRAME_GAP,
    PAPER,
    as_pictures,
    enlarge,
    film_strip,
    grid,
    normalised,
    png_bytes,
)
from snapgen_jax.evaluation.sample_grid import SampleGrid
from tests.generators_for_tests import Validation as Split
from tests.generators_for_tests import by_edit, by_label, by_prompt


class Generator:
    def generate(self, prompts, *, seed=0, indices=None, **options):
        self.asked = (prompts, seed, indices, options)
        return np.stack([np.full((16, 16, 3), 10 * n, np.uint8) for n in range(len(prompts))])


class Source:
    def __len__(self):
        return 3

    def example(self, index, rng, names):
        return {"caption": f"caption {index} {rng.integers(100)}"}


class Validation:
    source = Source()


def test_the_grid_draws_its_prompts_from_its_seed():
    generator = Generator()
    result = SampleGrid(prompts=("a", "b"), seed=7, options={"steps": 4})(generator)
    assert generator.asked == (["a", "b"], 7, None, {"steps": 4})
    assert result.numbers == {} and result.pictures["samples"].dtype == np.uint8


def test_without_prompts_it_draws_captions_of_the_validation_split_and_always_the_same():
    first, second = Generator(), Generator()
    SampleGrid(count=8)(first, Validation())
    SampleGrid(count=8)(second, Validation())
    assert first.asked == second.asked
    assert [caption[:9] for caption in first.asked[0]] == ["caption 0", "caption 1", "caption 2"]
    with pytest.raises(ValueError, match="`prompts`"):
        SampleGrid()(first)


def test_images_are_enlarged_by_a_whole_factor_and_keep_their_pixels():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    large = enlarge(image, 112)
    assert large.shape == (128, 128, 3) and (large[::4, ::4] == image).all()
    picture = grid(image[None])
    assert any((picture[y : y + 128, x : x + 128] == large).all() for y in range(20) for x in range(20))


def test_captions_stand_below_and_rows_wrap():
    images = np.zeros((5, 32, 32, 3), np.uint8)
    plain, captioned = grid(images, columns=4), grid(images, ["a long caption " * 3] * 5, columns=4)
    assert captioned.shape[0] > plain.shape[0] and captioned.shape[1] == plain.shape[1]
    below = captioned[10 + 128 : 10 + 128 + 30, 10:138]
    assert (below != PAPER).any()


def test_a_mismatch_is_refused():
    with pytest.raises(ValueError, match="2 images came with 1 captions"):
        grid(np.zeros((2, 8, 8, 3), np.uint8), ["one"])
    with pytest.raises(ValueError, match="at least one image"):
        grid(np.zeros((0, 8, 8, 3), np.uint8))


def test_png_bytes_open_as_the_same_image():
    import io

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(png_bytes(image)))) == image).all()


# --- runs with other conditions and outputs --------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """The arguments of the last grid that an evaluator lays out."""
    calls = {}

    def spy(pictures, titles, *, columns):
        calls.update(pictures=pictures, titles=list(titles), columns=columns)
        return grid(pictures, titles, columns=columns)

    monkeypatch.setattr(sample_grid, "grid", spy)
    return calls


def test_a_run_without_prompts_is_shown_by_the_labels_of_the_validation_split(shown):
    SampleGrid(count=4)(by_label(), Split())
    assert shown["titles"] == ["label 0", "label 20", "label 30", "label 40"]  # example 1 cannot be read
    assert shown["pictures"][:, 0, 0, 0].tolist() == [0, 20, 30, 40] and shown["columns"] == 8
    with pytest.raises(ValueError, match="takes the arrays label, from the validation split, and got none"):
        SampleGrid()(by_label())
    with pytest.raises(ValueError, match="takes no prompts"):
        SampleGrid(prompts=("a",))(by_label(), Split())


def test_a_run_that_edits_is_shown_with_images_and_captions_of_the_same_examples(shown):
    SampleGrid(count=3)(by_edit(), Split())
    assert shown["titles"] == ["0", "2", "3"] and shown["pictures"][:, 0, 0, 0].tolist() == [0, 6, 9]
    SampleGrid(prompts=("50", "60"))(by_edit(), Split())
    assert shown["titles"] == ["50", "60"] and shown["pictures"][:, 0, 0, 0].tolist() == [50, 64]
    with pytest.raises(ValueError, match=r"11 prompts need as many examples .* it has 10"):
        SampleGrid(prompts=("1",) * 11)(by_edit(), Split())


def test_clips_are_film_strips_in_rows_of_their_own_with_the_caption_below(shown):
    picture = SampleGrid(prompts=("30", "60"), output="clip")(by_prompt()).pictures["samples"]
    assert shown["columns"] == 1 and shown["titles"] == ["30", "60"]
    strips = shown["pictures"]
    np.testing.assert_array_equal(strips[0, 0, :: 64 + FRAME_GAP, 0], [30, 32, 33, 35, 36, 38, 39, 41])
    assert picture.shape[1] > strips.shape[2] and picture.shape[0] > 2 * strips.shape[1] + 2 * 14
    below = picture[10 + strips.shape[1] : 10 + strips.shape[1] + 14]
    assert (below != PAPER).any()


def test_depth_maps_are_shown(shown):
    SampleGrid(prompts=("3",), output="depth")(by_prompt())
    assert shown["pictures"].shape == (1, 8, 8, 3)
    assert shown["pictures"][0, :, 0, 0].tolist() == [0, 36, 73, 109, 146, 182, 219, 255]


def test_an_output_that_is_missing_or_no_picture_is_named_with_those_there_are():
    there = r"'clip' uint8 \[N, 12, 8, 8, 3\], 'depth' float32 .*'draw' float32 \[N\], 'image' uint8 \[N, 8, 8, 3\]"
    with pytest.raises(ValueError, match=f"no output 'video'; set .*`output` to one of {there}"):
        SampleGrid(prompts=("1",), output="video")(by_prompt())
    with pytest.raises(ValueError, match=rf"'draw': float32 \[1\] is no picture; .* gives {there}"):
        SampleGrid(prompts=("1",), output="draw")(by_prompt())
    with pytest.raises(ValueError, match=r"no output 'clip'; .* 'image' uint8 \[N, 16, 16, 3\]$"):
        SampleGrid(prompts=("1",), output="clip")(Generator())  # as of a bundle, which has images alone


# --- pictures of clips and maps --------------------------------------------------------------------------------------


def test_a_strip_shows_every_frame_of_a_short_clip_and_eight_of_a_long_one():
    frames = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 32, 3), np.uint8)
    three = film_strip(frames[:3])
    assert three.shape == (64, 3 * 32 + 2 * FRAME_GAP, 3)
    assert [three[0, n * (32 + FRAME_GAP), 0] for n in range(3)] == [0, 1, 2]
    assert (three[:, 32 : 32 + FRAME_GAP] == PAPER).all()
    long = film_strip(frames)
    assert [long[0, n * (32 + FRAME_GAP), 0] for n in range(8)] == [0, 2, 4, 6, 9, 11, 13, 15]
    assert film_strip(frames, most_frames=1).shape == (64, 32, 3)
    with pytest.raises(ValueError, match="at least one frame"):
        film_strip(frames[:0])


def test_a_map_is_grey_from_its_smallest_to_its_largest_value_and_one_clip_has_one_scale():
    np.testing.assert_array_equal(normalised(np.array([-2.0, 0.0, 2.0])), [0, 128, 255])
    np.testing.assert_array_equal(normalised(np.array([np.nan, 1.0, 3.0, np.inf], np.float32)), [0, 0, 255, 0])
    assert normalised(np.full((2, 2), 7.0)).tolist() == [[128, 128]] * 2
    assert normalised(np.full((2,), np.nan)).tolist() == [0, 0]
    maps = np.stack([np.linspace(0, 1, 64), np.linspace(5, 25, 64)]).reshape(2, 8, 8, 1)
    first, second = as_pictures(maps)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (8, 8, 3) and (first[..., 0] == first[..., 2]).all()
    brighter = np.stack([np.zeros((64, 64, 1)), np.ones((64, 64, 1))])[None]
    assert as_pictures(brighter)[0, 0, [0, -1], 0].tolist() == [0, 255]


def test_images_pass_as_they_are_and_one_channel_becomes_grey():
    image = np.random.default_rng(0).integers(0, 255, (2, 9, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(as_pictures(image), image)
    np.testing.assert_array_equal(as_pictures(image[..., :1])[..., 2], image[..., 0])


@pytest.mark.parametrize("array", [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 1), int), np.zeros((8, 8, 3), np.uint8)])
def test_other_arrays_are_no_pictures(array):
    with pytest.raises(ValueError, match="is no picture; give images uint8"):
        as_pictures(array)
