"""Measures of reconstructions on images whose right answer is known, and the evaluator that collects them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.evaluation.reconstruction import Reconstruction, compare


def pictures(count, size=16):
    """Smooth pictures of random colours."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, size)[None, :, None, None] * np.linspace(0, 1, size)[None, None, :, None]
    return (60 + 120 * rng.random((count, 1, 1, 3)) * ramp).astype(np.uint8)


def test_equal_images_are_perfect():
    images = pictures(6)
    measured = compare(images, images)
    assert measured["psnr"] == 100 and measured["ssim"] == pytest.approx(1)
    assert measured["frechet"] == pytest.approx(0, abs=1e-4) and measured["colour_shift"] == 0


def test_a_shift_of_one_colour_is_named_and_costs_what_the_formula_says():
    images = pictures(6)
    shifted = images.copy()
    shifted[..., 1] += 12
    measured = compare(images, shifted)
    assert (measured["shift_red"], measured["shift_green"], measured["shift_blue"]) == (0, 12, 0)
    assert measured["colour_shift"] == pytest.approx(4)
    assert measured["psnr"] == pytest.approx(10 * np.log10(255**2 / (12**2 / 3)), rel=1e-6)
    assert measured["frechet"] > 1e-5


def test_shifts_that_cancel_over_images_are_not_lost():
    images = pictures(2)
    moved = images.copy()
    moved[0] += 10
    moved[1] -= 10
    measured = compare(images, moved)
    assert measured["shift_red"] == pytest.approx(0) and measured["colour_shift"] == pytest.approx(10)


def test_noise_costs_structure_and_a_shift_of_the_same_error_does_not():
    images = pictures(4)
    rng = np.random.default_rng(1)
    noisy = np.clip(images + 8 * rng.choice([-1, 1], images.shape), 0, 255).astype(np.uint8)
    measured, shifted = compare(images, noisy), compare(images, images + np.uint8(8))
    assert measured["psnr"] == pytest.approx(shifted["psnr"], abs=0.1)
    assert measured["ssim"] < 0.8 < 0.95 < shifted["ssim"]


@dataclasses.dataclass
class Batch:
    arrays: dict
    valid: np.ndarray
    source_index: np.ndarray
    bucket: str = "16x16"


class Validation:
    """Ten images in batches of four, over and over; the third cannot be read."""

    def __iter__(self):
        position = 0
        while True:
            rows = (np.arange(4) + position) % 10
            yield Batch({"image": pictures(10)[rows]}, rows != 2, rows)
            position += 4


def decode(params, frozen, batch, key):
    """Two decoders: one keeps the image, one moves it by a parameter."""
    moved = batch["image"] + params.astype(jnp.uint8)
    distance = jnp.mean(jnp.abs(moved.astype(jnp.float32) - batch["image"]), axis=(1, 2, 3)) + frozen
    return {"original": batch["image"], "large": batch["image"], "tiny": moved, "lpips/tiny": distance}


def test_the_evaluator_measures_each_readable_image_once_and_shows_them_side_by_side():
    generator = types.SimpleNamespace(params=jnp.float32(5), frozen=jnp.float32(1))
    result = Reconstruction(decode, examples=100, shown=3)(generator, Validation())
    assert result.numbers["reconstruction.large.psnr"] == 100
    assert result.numbers["reconstruction.tiny.colour_shift"] == pytest.approx(5)
    assert result.numbers["reconstruction.tiny.lpips"] == pytest.approx(6)
    assert "reconstruction.large.lpips" not in result.numbers
    height, width, _ = result.pictures["reconstruction"].shape
    assert height > width * 0.9 and result.pictures["reconstruction"].dtype == np.uint8  # three rows of three

    counted = []

    def count(params, frozen, batch, key):
        jax.debug.callback(lambda n: counted.append(int(n)), batch["image"].shape[0])
        return {"original": batch["image"], "made": batch["image"]}

    Reconstruction(count, examples=100)(generator, Validation())
    assert counted == [4, 4, 4]  # ten images, not two epochs of them


def test_without_images_there_is_nothing_to_compare_with():
    with pytest.raises(ValueError, match="validation split"):
        Reconstruction(decode)(None)
