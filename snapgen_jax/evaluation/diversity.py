"""Diversity: how much the images of one prompt differ from seed to seed. A collapsed model scores near zero."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import pdist


def pairwise_distances(features: np.ndarray) -> np.ndarray:
    """Mean Euclidean distance over pairs of seeds, of each prompt: `[P]`.

    Args:
        features: `[P, S, D]`, P prompts with S seeds each.

    Raises:
        ValueError: there is no pair to compare.
    """
    if features.ndim != 3 or features.shape[0] < 1 or features.shape[1] < 2:
        raise ValueError(f"diversity is measured on features [P, S, D] with S >= 2 seeds, got {features.shape}")
    return np.array([pdist(seeds.astype(np.float64)).mean() for seeds in features])
