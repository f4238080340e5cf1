"""The Frechet distance against its closed forms, and on images the order that a person would give."""

import numpy as np
import pytest
from scipy import linalg, ndimage
from sklearn.datasets import load_digits

from snapgen_jax.evaluation.features import image_features
from snapgen_jax.evaluation.frechet import frechet_distance, gaussian_frechet_distance


def covariance(seed: int, size: int = 6) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T


def test_distance_between_gaussians_of_equal_covariance_is_that_of_their_means():
    a, b = np.zeros(6), np.arange(6.0)
    assert gaussian_frechet_distance(a, covariance(0), b, covariance(0)) == pytest.approx(np.sum(b**2))


def test_distance_between_independent_coordinates_is_that_of_their_deviations():
    # One dimension: (m_a - m_b)^2 + (s_a - s_b)^2, and coordinates add up.
    s_a, s_b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.0])
    distance = gaussian_frechet_distance(np.zeros(3), np.diag(s_a**2), np.ones(3), np.diag(s_b**2))
    assert distance == pytest.approx(3 + np.sum((s_a - s_b) ** 2))


def test_distance_agrees_with_the_matrix_square_root_of_the_paper():
    a, b = covariance(1), covariance(2)
    expected = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert gaussian_frechet_distance(np.zeros(6), a, np.zeros(6), b) == pytest.approx(expected, rel=1e-6)


def test_distance_is_symmetric_and_vanishes_only_for_equal_moments():
    features = np.random.default_rng(0).normal(size=(200, 8))
    shuffled = features[::-1]
    assert frechet_distance(features, shuffled) == pytest.approx(0, abs=1e-9)
    other = 1.1 * features + 0.2
    assert frechet_distance(features, other) == pytest.approx(frechet_distance(other, features))
    # an affine map of one set: the means differ by 0.1 m + 0.2, the deviations by a tenth
    means = np.sum((0.1 * features.mean(0) + 0.2) ** 2)
    assert frechet_distance(features, other) == pytest.approx(means + 0.01 * features.var(0, ddof=1).sum())


def test_fewer_images_than_features_still_have_a_distance():
    features = np.random.default_rng(0).normal(size=(10, 40))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 1) == pytest.approx(40)


@pytest.mark.parametrize(("a", "b"), [((1, 4), (5, 4)), ((5, 4), (5,)), ((5, 4), (5, 3))])
def test_sets_that_have_no_distance_are_refused(a, b):
    with pytest.raises(ValueError, match="features"):
        frechet_distance(np.ones(a), np.ones(b))


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Scanned digits, 32 px, in two disjoint halves: uint8 [N, 32, 32, 3] each."""
    images = np.random.default_rng(0).permutation(load_digits().images)[:600]
    images = np.clip(ndimage.zoom(images, (1, 4, 4), order=1) * 255 / 16, 0, 255).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    return images[:300], images[300:]


@pytest.fixture(scope="module")
def reference(digits):
    return image_features(digits[0])


def blurred(images, sigma):
    return ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0)).astype(np.uint8)


def noisy(images, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("corrupt", "strengths"), [(blurred, (0, 1, 2, 4)), (noisy, (0, 10, 30, 90))])
def test_distance_from_real_images_grows_with_the_corruption(digits, reference, corrupt, strengths):
    distances = [frechet_distance(reference, image_features(corrupt(digits[1], s))) for s in strengths]
    assert np.all(np.diff(distances) > 0)
    assert distances[-1] > 10 * distances[0]  # held-out real images are the floor


def test_images_that_are_all_alike_are_far_from_real_ones_however_good_they_are(digits, reference):
    floor = frechet_distance(reference, image_features(digits[1]))
    collapsed = frechet_distance(reference, image_features(np.repeat(digits[1][:1], 300, axis=0)))
    assert collapsed > 10 * floor


def test_features_see_colour(digits, reference):
    red = digits[1] * np.array([1, 0, 0], np.uint8)
    assert frechet_distance(reference, image_features(red)) > 10 * frechet_distance(
        reference, image_features(digits[1])
    )
