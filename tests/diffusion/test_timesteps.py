"""Timestep densities against SciPy, the resolution shift against its algebra, and the grid of inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from snapgen_jax.diffusion.schedules import FlowSchedule
from snapgen_jax.diffusion.timesteps import logit_normal_density, sample_times, shift_time, time_grid


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 0.7, 1.0), (0.0, 1.0, 3.0)])
def test_logit_of_logit_normal_times_is_normal_and_a_shift_adds_its_logarithm_to_the_mean(mean, std, shift):
    t = sample_times(jax.random.key(1), (20_000,), FlowSchedule(mean=mean, std=std, shift=shift))
    assert t.dtype == jnp.float32
    logit = special.logit(np.asarray(t, np.float64))
    assert stats.kstest(logit, stats.norm(mean + np.log(shift), std).cdf).pvalue > 0.01


@pytest.mark.parametrize(("progress", "mean"), [(0.0, 2.0), (0.5, 1.5), (1.0, 1.0)])
def test_the_mean_moves_with_the_progress_of_the_run(progress, mean):
    config = FlowSchedule(mean=2.0, std=0.5, final_mean=1.0)
    logit = special.logit(np.asarray(sample_times(jax.random.key(1), (20_000,), config, progress), np.float64))
    assert stats.kstest(logit, stats.norm(mean, 0.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_times_are_uniform_before_the_shift(shift):
    t = sample_times(jax.random.key(2), (20_000,), FlowSchedule(density="uniform", shift=shift))
    assert stats.kstest(shift_time(np.asarray(t, np.float64), 1 / shift), stats.uniform.cdf).pvalue > 0.01


def test_times_keep_the_asked_shape_and_lie_in_the_unit_interval():
    for density in ("logit_normal", "uniform"):
        t = sample_times(jax.random.key(0), (64, 3), FlowSchedule(density=density, shift=2.0))
        assert t.shape == (64, 3)
        assert jnp.all((t >= 0) & (t <= 1))


def test_an_unknown_density_is_refused_by_name():
    with pytest.raises(ValueError, match="'cosine'"):
        sample_times(jax.random.key(0), (1,), FlowSchedule(density="cosine"))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6)])
def test_logit_normal_density_is_the_one_of_its_samples_and_integrates_to_one(mean, std):
    total, _ = integrate.quad(lambda t: float(logit_normal_density(t, mean, std)), 0, 1, epsabs=1e-4)
    assert total == pytest.approx(1, abs=1e-3)
    t = np.linspace(0.05, 0.95, 19)
    cdf = stats.norm(mean, std).cdf
    slope = (cdf(special.logit(t + 1e-5)) - cdf(special.logit(t - 1e-5))) / 2e-5
    np.testing.assert_allclose(logit_normal_density(t, mean, std), slope, rtol=1e-4)


def test_standard_logit_normal_density_peaks_in_the_middle_and_vanishes_at_both_ends():
    t = jnp.linspace(0, 1, 101)
    rho = logit_normal_density(t)
    assert int(jnp.argmax(rho)) == 50
    assert float(rho[50]) == pytest.approx(4 / np.sqrt(2 * np.pi), rel=1e-6)
    assert rho[0] == 0 and rho[-1] == 0
    assert jnp.all(jnp.isfinite(jax.vmap(jax.grad(logit_normal_density))(t)))


def test_shift_is_the_identity_at_one_keeps_the_ends_and_composes_by_multiplication():
    t = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(shift_time(t, 1.0), t)
    assert shift_time(0.0, 3.0) == 0 and shift_time(1.0, 3.0) == 1
    assert shift_time(0.5, 3.0) == pytest.approx(0.75)
    np.testing.assert_allclose(shift_time(shift_time(t, 2.0), 1.5), shift_time(t, 3.0))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_time_grid_falls_from_exactly_one_to_exactly_zero(shift):
    grid = time_grid(7, shift)
    assert grid.shape == (8,) and grid.dtype == np.float32
    assert grid[0] == 1 and grid[-1] == 0
    assert np.all(np.diff(grid) < 0)
    np.testing.assert_allclose(shift_time(grid, 1 / shift), np.linspace(1, 0, 8), atol=1e-6)


def test_time_grid_of_one_step_is_both_ends_and_of_none_is_refused():
    np.testing.assert_array_equal(time_grid(1, 3.0), [1, 0])
    with pytest.raises(ValueError, match="at least one step"):
        time_grid(0)
