"""Sample grids: the same prompts and noise at every step, as one picture with captions."""

import numpy as np
import pytest

from snapgen_jax.evaluation.pictures import PAPER, enlarge, grid, png_bytes
from snapgen_jax.evaluation.sample_grid import SampleGrid


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
