"""Diversity: zero for a collapsed model, and the known mean distance between Gaussian draws."""

import numpy as np
import pytest

from snapgen_jax.evaluation.diversity import pairwise_distances


def test_the_mean_is_over_pairs_of_seeds_within_each_prompt_only():
    features = np.array([[[0.0, 0.0], [3.0, 4.0]], [[100.0, 0.0], [100.0, 1.0]]])
    assert pairwise_distances(features) == pytest.approx([5, 1])
    three = np.array([[[0.0], [1.0], [3.0]]])
    assert pairwise_distances(three) == pytest.approx([(1 + 2 + 3) / 3])


def test_a_model_that_ignores_its_seed_scores_zero():
    features = np.repeat(np.random.default_rng(0).normal(size=(5, 1, 8)), 4, axis=1)
    assert pairwise_distances(features).tolist() == [0] * 5


def test_gaussian_draws_have_the_known_mean_distance():
    # In one dimension the mean of |x - y| for independent N(0, s^2) is 2 s / sqrt(pi).
    features = np.random.default_rng(0).normal(0, 3, size=(2000, 6, 1))
    assert pairwise_distances(features).mean() == pytest.approx(6 / np.sqrt(np.pi), rel=0.02)


@pytest.mark.parametrize("shape", [(4, 1, 8), (0, 2, 8), (4, 8)])
def test_a_single_seed_has_no_diversity(shape):
    with pytest.raises(ValueError, match="S >= 2"):
        pairwise_distances(np.ones(shape))
