"""The Frechet distance between two sets of features: how far generated images are from real ones, as distributions."""

from __future__ import annotations

import numpy as np


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features `[N, D]` and `[M, D]`.

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6. Small sets overestimate the distance, so
    compare numbers of equal N and M only.

    Raises:
        ValueError: a set has fewer than two rows, or the widths differ.
    """
    for name, features in (("first", features_a), ("second", features_b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"a covariance needs features [N, D] with N >= 2; the {name} set is {features.shape}")
    return gaussian_frechet_distance(*_moments(features_a), *_moments(features_b))


def gaussian_frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians, `[D]` means and `[D, D]` covariances.

        d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2))

    Dowson & Landau 1982. The last trace is the sum of the singular values of C_a^(1/2) C_b^(1/2): real and stable where
    a covariance is singular, as those of few images are.
    """
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"features of widths {mean_a.shape} and {mean_b.shape} have no distance; use one extractor for both"
        )
    overlap = np.linalg.norm(_root(cov_a) @ _root(cov_b), ord="nuc")
    squared = np.sum(np.square(mean_a - mean_b)) + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return max(float(squared), 0.0)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = features.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _root(cov: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
