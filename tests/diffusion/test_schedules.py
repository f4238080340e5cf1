"""Schedules: published tables and grids, densities of training, and DDIM and Karras samplers written out in z."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from snapgen_jax.diffusion.path import expand_like
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.schedules import EDMSchedule, FlowSchedule, Level, VPSchedule
from snapgen_jax.diffusion.timesteps import sample_times, time_grid

SCHEDULES = {
    "flow": FlowSchedule(),
    **{name: VPSchedule.preset(name) for name in VPSchedule.PRESETS},
    **{name: EDMSchedule.preset(name) for name in EDMSchedule.PRESETS},
}
VP = list(VPSchedule.PRESETS)


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    return request.param


# --- what all have in common ---


def test_levels_obey_the_definition_of_path_time_whoever_gives_them(schedule):
    levels = {
        "draw": schedule.draw(jax.random.key(0), (64, 2)),
        "grid": schedule.grid(11),
        "static": schedule.level(np.linspace(0.05, 0.95, 7)),
        "traced": schedule.level(jnp.linspace(0.05, 0.95, 7)),
    }
    for name, level in levels.items():
        shape = {"draw": (64, 2), "grid": (12,)}.get(name, (7,))
        assert all(a.shape == shape and a.dtype == np.float32 for a in level), name
        assert all(isinstance(a, np.ndarray) == (name in ("grid", "static")) for a in level), name
        np.testing.assert_allclose(level.t, level.sigma / (level.alpha + level.sigma), atol=2e-6)


def test_a_grid_falls_from_noise_to_exactly_the_data_and_is_finite(schedule):
    grid = schedule.grid(7)
    assert np.all(np.diff(grid.t) < 0)
    assert (grid.t[-1], grid.alpha[-1], grid.sigma[-1]) == (0, 1, 0)
    assert all(np.isfinite(a).all() for a in grid)
    with pytest.raises(ValueError, match=r"at least one step|between 1 and"):
        schedule.grid(0)


def test_static_and_traced_levels_agree_and_the_ends_of_the_path_are_finite(schedule):
    t = np.array([0.0, 0.1, 0.5, 0.9, 1.0], np.float32)
    static, traced = schedule.level(t), jax.jit(schedule.level)(jnp.asarray(t))
    for a, b in zip(static, traced, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_levels_are_picked_by_one_index_for_the_batch_or_by_one_an_example(schedule):
    grid = schedule.grid(4)
    for a, whole in zip(jax.jit(lambda i: grid.at(i, 3))(jnp.int32(2)), grid, strict=True):
        np.testing.assert_array_equal(a, np.full(3, whole[2]))
    for a, whole in zip(grid.at(jnp.array([3, 0, 4])), grid, strict=True):
        np.testing.assert_array_equal(a, whole[[3, 0, 4]])


def test_training_levels_are_a_pure_function_of_the_key(schedule):
    first, again, other = (schedule.draw(jax.random.key(k), (8,)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.t, other.t)


def test_an_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'sd3'.*sd15, zero_snr, dit, cosine"):
        VPSchedule.preset("sd3")


# --- flow ---


def test_the_flow_draws_and_samples_the_times_of_rectified_flow_bit_by_bit():
    schedule = FlowSchedule(mean=0.3, std=0.8, shift=2.0, final_mean=-1.0)
    key = jax.random.key(5)
    mean = 0.3 + 0.25 * (-1.0 - 0.3)
    t = jax.nn.sigmoid(mean + 0.8 * jax.random.normal(key, (16,)))
    level = schedule.draw(key, (16,), 0.25)
    np.testing.assert_array_equal(level.t, 2.0 * t / (1 + t))
    np.testing.assert_array_equal(level.t, sample_times(key, (16,), schedule, 0.25))
    jax.tree.map(np.testing.assert_array_equal, level, Level(level.t, 1 - level.t, level.t, level.t))
    for shift in (1.0, 3.0):
        grid = schedule.grid(5, shift)
        np.testing.assert_array_equal(grid.t, time_grid(5, shift))
        np.testing.assert_array_equal(grid.time, grid.t)


# --- VP ---


def test_alpha_bar_is_that_of_the_published_tables():
    # Stable Diffusion: sqrt(alpha_bar) = 0.0683 and SNR 0.00468 at the last step (Lin et al. 2024, table 1); DDPM's
    # linear betas: alpha_bar = 4.04e-5; the first alpha_bar is 1 - beta_start.
    alpha, sigma = VPSchedule.preset("sd15").table()
    assert alpha.dtype == np.float64
    assert alpha[0] ** 2 == pytest.approx(1 - 0.00085, rel=1e-12)
    assert alpha[-1] == pytest.approx(0.0683, abs=5e-5)
    assert (alpha[-1] / sigma[-1]) ** 2 == pytest.approx(0.00468, abs=5e-6)
    alpha, _ = VPSchedule.preset("dit").table()
    assert alpha[-1] ** 2 == pytest.approx(4.0358e-5, rel=1e-4)
    alpha, _ = VPSchedule.preset("cosine").table()
    for n in (0, 300, 700, 990):
        f = [np.cos((u / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for u in (n + 1, 0)]
        assert alpha[n] ** 2 == pytest.approx(f[0] / f[1], rel=1e-9)
    for name in VP:
        alpha, sigma = SCHEDULES[name].table()
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


def test_zero_terminal_snr_ends_in_pure_noise_and_leaves_the_first_step():
    alpha, sigma = VPSchedule(zero_terminal_snr=True).table()
    before, _ = VPSchedule().table()
    assert (alpha[-1], sigma[-1], alpha[0]) == (0.0, 1.0, before[0])
    slope = np.diff(alpha) / np.diff(before)
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)  # linear in sqrt(alpha_bar)
    grid = VPSchedule.preset("zero_snr").grid(50)
    assert (grid.t[0], grid.time[0]) == (1.0, 999.0)


def test_native_steps_of_the_grids_are_those_of_the_public_schedulers():
    # DDIMScheduler(timestep_spacing=..., steps_offset=...).set_timesteps(n) of diffusers, and DiT's respacing.
    def steps(n, **fields):
        grid = VPSchedule(**fields).grid(n)
        assert grid.time[-1] == 0
        return grid.time[:-1].tolist()

    assert steps(50) == list(range(981, 0, -20))
    assert steps(25, steps_offset=0) == list(range(960, -1, -40))
    assert steps(8, spacing="trailing", steps_offset=0) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert steps(50, spacing="trailing") == list(range(999, 0, -20))
    assert steps(1, spacing="trailing") == [999]
    assert steps(10, spacing="linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert steps(5, spacing="linspace") == [999, 749, 500, 250, 0]


@pytest.mark.parametrize("n", [3, 7, 16, 30, 48, 60, 96, 500, 1000])
def test_trailing_and_linspace_steps_follow_the_loops_of_their_origins(n):
    trailing = VPSchedule(spacing="trailing").grid(n).time[:-1]
    np.testing.assert_array_equal(trailing, np.round(np.arange(1000, 0, -1000 / n))[:n] - 1)
    respaced, position = [], 0.0
    for _ in range(n):
        respaced.append(round(position))
        position += 999 / (n - 1)
    np.testing.assert_array_equal(VPSchedule(spacing="linspace").grid(n).time[:-1], respaced[::-1])


@pytest.mark.parametrize("name", VP)
def test_a_grid_holds_the_very_entries_of_the_table(name):
    schedule = SCHEDULES[name]
    grid = schedule.grid(20)
    n = grid.time[:-1].astype(int)
    np.testing.assert_array_equal(n, grid.time[:-1])
    alpha, sigma = schedule.table()
    np.testing.assert_array_equal(grid.alpha[:-1], alpha[n].astype(np.float32))
    np.testing.assert_array_equal(grid.sigma[:-1], sigma[n].astype(np.float32))
    np.testing.assert_array_equal(grid.t[:-1], (sigma / (alpha + sigma))[n].astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, schedule.at_step(n), Level(*(a[:-1] for a in grid)))


def test_impossible_grids_are_refused_with_what_to_change():
    with pytest.raises(ValueError, match=r"begin at step 1000.*offset 0"):
        VPSchedule().grid(1000)
    with pytest.raises(ValueError, match=r"between 1 and 1000.*got 1001"):
        VPSchedule().grid(1001)
    with pytest.raises(ValueError, match=r"one step.*'trailing'"):
        VPSchedule().grid(1)
    for schedule in (VPSchedule(), EDMSchedule()):
        with pytest.raises(ValueError, match=r"shift = 3.*leave shift at 1"):
            schedule.grid(4, shift=3.0)


def test_training_steps_are_uniform_or_favour_noise_by_a_power():
    uniform = VPSchedule().draw(jax.random.key(0), (20_000,))
    n = np.asarray(uniform.time)
    assert np.array_equal(n, n.astype(int)) and n.min() >= 0 and n.max() <= 999
    assert stats.kstest((n + 0.5) / 1000, stats.uniform.cdf).pvalue > 0.01
    alpha, sigma = VPSchedule().table()
    np.testing.assert_array_equal(uniform.alpha, alpha[n.astype(int)].astype(np.float32))
    np.testing.assert_array_equal(uniform.sigma, sigma[n.astype(int)].astype(np.float32))
    u = np.asarray(VPSchedule(density_power=3.0).draw(jax.random.key(1), (20_000,)).time + 0.5) / 1000
    assert stats.kstest(u, stats.beta(3, 1).cdf).pvalue > 0.01
    assert np.mean(u > 0.9) == pytest.approx(0.271, abs=0.015)


def test_the_native_time_of_a_path_time_is_interpolated_between_steps():
    schedule = VPSchedule()
    on_grid = schedule.at_step(np.array([0, 250, 999]))
    np.testing.assert_allclose(schedule.level(on_grid.t).time, [0, 250, 999], atol=0.01)
    middle = schedule.level((on_grid.t[1] + schedule.at_step(251).t) / 2)
    assert middle.time == pytest.approx(250.5, abs=0.01)
    assert (schedule.level(0.0).time, schedule.level(1.0).time) == (0, 999)


# --- EDM ---


def test_karras_levels_are_those_of_the_formula_and_of_sf_v():
    np.testing.assert_allclose(
        EDMSchedule.preset("svd").karras_levels(4), [0.002, 2.269, 70.54, 700], rtol=3e-4
    )  # the levels of SF-V's generator
    grid = EDMSchedule().grid(18)
    sigma = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(grid.sigma, [*sigma, 0], rtol=1e-6)
    np.testing.assert_allclose(grid.time[:-1], np.log(sigma) / 4, rtol=1e-5)
    np.testing.assert_array_equal(EDMSchedule.preset("svd").grid(1).sigma, [700, 0])


def test_native_levels_at_sigma_700_keep_the_digits_that_path_time_has_lost():
    level = EDMSchedule.preset("svd").grid(25)
    assert (level.sigma[0], level.time[0]) == (700, np.float32(np.log(700) / 4))
    lost = level.t[0] / (1 - level.t[0])
    assert 1e-6 < abs(lost / 700 - 1) < 1e-4
    assert EDMSchedule.preset("svd").level(1.0).sigma == 700


def test_training_noise_is_lognormal():
    level = EDMSchedule(mean=-0.4, std=1.3).draw(jax.random.key(0), (20_000,))
    log_sigma = np.log(np.asarray(level.sigma, np.float64))
    assert stats.kstest(log_sigma, stats.norm(-0.4, 1.3).cdf).pvalue > 0.01
    np.testing.assert_allclose(level.time, log_sigma / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "quantiles"),
    [(-2, (0.0266, 0.136, 0.703)), (-1, (0.0711, 0.369, 1.93)), (0, (0.196, 1.0, 5.20)), (1, (0.526, 2.73, 14.2))],
)
def test_discrete_lognormal_noise_has_the_quantiles_of_sf_v(mean, quantiles):
    schedule = EDMSchedule(density="discrete_lognormal", mean=mean, std=1.0, levels=1000, sigma_max=700.0)
    levels = schedule.karras_levels(1000)[1:]
    cumulative = np.cumsum(schedule.level_probabilities())
    exact = levels[np.searchsorted(cumulative, [0.05, 0.5, 0.95])]
    np.testing.assert_allclose(exact, quantiles, rtol=4e-3)  # printed with three digits
    level = schedule.draw(jax.random.key(0), (50_000,))
    assert np.isin(np.asarray(level.sigma), levels.astype(np.float32)).all()
    np.testing.assert_allclose(np.quantile(level.sigma, [0.05, 0.5, 0.95]), quantiles, rtol=0.05)


def test_a_generator_trained_on_a_few_levels_sees_each_alike_and_never_the_lowest():
    schedule = EDMSchedule(density="levels", levels=4, sigma_data=1.0, sigma_max=700.0)
    sigma, counts = np.unique(np.asarray(schedule.draw(jax.random.key(0), (9000,)).sigma), return_counts=True)
    np.testing.assert_allclose(sigma, [2.269, 70.54, 700], rtol=3e-4)
    np.testing.assert_allclose(counts / 9000, 1 / 3, atol=0.02)


def test_values_that_make_no_schedule_are_refused():
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        EDMSchedule(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="density_power is 0"):
        VPSchedule(density_power=0)
    with pytest.raises(ValueError, match="unknown betas 'square'"):
        VPSchedule(betas="square").grid(4)
    with pytest.raises(ValueError, match="unknown spacing 'middle'"):
        VPSchedule(spacing="middle").grid(4)
    with pytest.raises(ValueError, match="unknown density 'flat'"):
        EDMSchedule(density="flat").draw(jax.random.key(0), (1,))


# --- one sampler for all ---


def float64_grid(schedule, steps):
    """The grid of a VP schedule in float64, for a comparison that float32 cannot make."""
    n = schedule.grid(steps).time[:-1].astype(int)
    alpha, sigma = (a[n] for a in schedule.table())
    return [np.append(a, end) for a, end in zip((sigma / (alpha + sigma), alpha, sigma, n), (0, 1, 0, 0), strict=True)]


@pytest.mark.parametrize("name", VP)
def test_a_ddim_step_is_the_euler_step_of_the_path(name):
    schedule, rng = SCHEDULES[name], np.random.default_rng(0)
    prediction = "v" if schedule.zero_terminal_snr else "eps"
    grid = float64_grid(schedule, 20)
    z, output = rng.normal(size=(2, 2, 5))
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        with jax.enable_x64(dtype is np.float64):
            for i, j in itertools.pairwise(range(21)):
                (t, a, s, _), (u, a_next, s_next, _) = ([column[k] for column in grid] for k in (i, j))
                # Song et al. 2021, eq. 12, eta = 0
                if prediction == "eps":
                    eps, x_0 = output, (z - s * output) / a
                else:
                    eps, x_0 = s * z + a * output, a * z - s * output
                expected = a_next * x_0 + s_next * eps
                level = Level(*(jnp.full(2, value, dtype) for value in (t, a, s, i)))
                x_t = jnp.asarray(z / (a + s), dtype)
                v = schedule.velocity(jnp.asarray(output, dtype), x_t, level, prediction)
                assert v.dtype == dtype
                euler = (x_t + dtype(u - t) * v) * dtype(a_next + s_next)
                np.testing.assert_allclose(euler, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", VP)
def test_sampling_a_vp_model_follows_its_ddim_chain_and_tells_it_integers(name):
    schedule = SCHEDULES[name]
    prediction = "v" if schedule.zero_terminal_snr else "eps"
    steps, noise = 20, jax.random.normal(jax.random.key(0), (2, 3, 3, 2))
    grid = schedule.grid(steps)
    n = grid.time[:-1].astype(int)

    def model(z, step):  # any smooth function of z and the step
        return 0.8 * z + 0.1 * np.sin(step / 100.0)

    def denoise(x_t, t, i, seen):
        level = grid.at(i, x_t.shape[0])
        output = 0.8 * schedule.network_input(x_t, level) + 0.1 * jnp.sin(expand_like(level.time, x_t) / 100.0)
        return schedule.velocity(output, x_t, level, prediction), seen.at[i].set(level.time[0])

    x, seen = sample(denoise, schedule.initial(noise, grid), grid.t, jnp.full(steps, -1.0))
    np.testing.assert_array_equal(seen, n)

    _, alpha, sigma, _ = float64_grid(schedule, steps)
    z = np.asarray(noise, np.float64)
    for i in range(steps):
        output = model(z, n[i])
        a, s = alpha[i], sigma[i]
        eps, x_0 = (output, (z - s * output) / a) if prediction == "eps" else (s * z + a * output, a * z - s * output)
        z = alpha[i + 1] * x_0 + sigma[i + 1] * eps
    np.testing.assert_allclose(x, z, rtol=0, atol=2e-4 * np.abs(z).max())


@pytest.mark.parametrize("name", ["edm", "svd"])
def test_sampling_an_edm_model_follows_the_euler_steps_of_karras_in_sigma(name):
    schedule = SCHEDULES[name]
    d = schedule.sigma_data
    grid = schedule.grid(18)
    noise = jax.random.normal(jax.random.key(0), (2, 4, 3))

    def denoise(x_t, t, i, carry):
        level = grid.at(i, x_t.shape[0])
        x = schedule.network_input(x_t, level)
        return schedule.velocity(jnp.tanh(x + expand_like(level.time, x)), x_t, level, "F"), carry

    x, _ = sample(denoise, schedule.initial(noise, grid), grid.t)

    sigma = np.append(schedule.karras_levels(18)[::-1], 0)
    z = sigma[0] * np.asarray(noise, np.float64)
    for s, s_next in itertools.pairwise(sigma):  # algorithm 1 without its correction; preconditioning of table 1
        f = np.tanh(z / np.sqrt(s**2 + d**2) + np.log(s) / 4)
        denoised = d**2 / (s**2 + d**2) * z + s * d / np.sqrt(s**2 + d**2) * f
        z = z + (s_next - s) * (z - denoised) / s
    np.testing.assert_allclose(x, z, rtol=0, atol=1e-4 * np.abs(z).max())
