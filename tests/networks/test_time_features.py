"""Time features: the sinusoid that Stable Diffusion's networks were trained with."""

import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.time_features import time_features


def test_features_are_cosines_then_sines_of_a_thousand_t_at_falling_frequencies():
    t = np.array([0.0, 0.25, 0.9371, 1.0])
    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    angles = 1000 * t[:, None] * frequencies
    features = time_features(jnp.asarray(t, jnp.float32))
    assert features.shape == (4, 256) and features.dtype == jnp.float32
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-4)


def test_native_steps_are_taken_as_they_are_with_scale_one():
    n = jnp.array([0.0, 1.0, 981.0])
    np.testing.assert_array_equal(time_features(n, 8, scale=1.0)[:, 0], jnp.cos(n))
    np.testing.assert_allclose(time_features(n, 8, scale=1.0), time_features(n / 1000, 8), atol=1e-4)


def test_times_in_bfloat16_are_computed_in_float32():
    t = jnp.array([0.5], jnp.bfloat16)  # exact in both
    np.testing.assert_array_equal(time_features(t, 8), time_features(t.astype(jnp.float32), 8))


def test_a_shift_of_one_ends_the_frequencies_at_the_least():
    n = jnp.array([3.0, 700.0])
    angles = np.asarray(n)[:, None] * 10_000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(time_features(n, 8, scale=1.0, shift=1), expected, atol=2e-4)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even"):
        time_features(jnp.zeros(1), 7)
