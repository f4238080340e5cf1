"""Diversity: how much the images of one prompt differ from seed to seed. A collapsed model scores near zero."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import pdist


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance over pairs of seeds, then over prompts.

    Args:
        features: `[P, S, D]`, P prompts with S seeds each.

    Raises:
        ValueError: there is no pair to compare.
    """
    if features.ndim != 3 or features.shape[0] < 1 or features.shape[1] < 2:
        raise ValueError(f"diversity is measured on features [P, S, D] with S >= 2 seeds, got {features.shape}")
    return float(np.mean([pdist(seeds.astype(np.float64)) for seeds in features]))
