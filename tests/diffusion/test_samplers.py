"""Samplers against the exact flow of Gaussian data (see conftest.py), and the contract of `sample`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import expand_like
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.schedules import EDMSchedule, VPSchedule
from snapgen_jax.diffusion.timesteps import time_grid

RANKS = {"vectors": (12,), "blocks": (4, 3), "images": (2, 2, 3), "clips": (3, 2, 2, 1)}  # twelve numbers an example


@pytest.fixture(params=["euler", "heun"])
def method(request):
    return request.param


@pytest.mark.parametrize("shape", RANKS.values(), ids=RANKS.keys())
def test_noise_is_carried_to_the_mean_and_covariance_of_the_data(gaussian, shape, method):
    # The velocity is affine in x, hence so is the sampler: x = M eps + m. Zero and the unit vectors show m and M, and
    # with them the mean m and the covariance M M^T of what it makes of white noise, without drawing any.
    probes = jnp.concatenate([jnp.zeros((1, 12)), jnp.eye(12)]).reshape(13, *shape)
    x, _ = jax.jit(lambda x: sample(gaussian.denoise, x, time_grid(200), method=method))(probes)
    assert x.shape == (13, *shape)
    mean, *columns = np.asarray(x).reshape(13, 12)
    m = np.stack(columns, axis=1) - mean[:, None]
    tolerance = {"euler": 0.02, "heun": 0.001}[method]
    np.testing.assert_allclose(mean, gaussian.mean, atol=tolerance)
    np.testing.assert_allclose(m @ m.T, gaussian.covariance, atol=tolerance)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_error_falls_with_the_order_of_the_method(gaussian, method, order, shift):
    eps = jax.random.normal(jax.random.key(0), (8, 12))

    def error(steps):
        x, _ = sample(gaussian.denoise, eps, time_grid(steps, shift), method=method)
        return np.sqrt(np.mean(np.square(x - gaussian.endpoint(eps))))

    errors = [error(steps) for steps in (24, 48, 96)]
    slopes = -np.diff(np.log2(errors))
    np.testing.assert_allclose(slopes, order, atol=0.2)


def test_ascending_times_invert_the_flow(gaussian):
    eps = jax.random.normal(jax.random.key(0), (8, 12))
    x_0 = jnp.asarray(gaussian.endpoint(eps))
    back, _ = sample(gaussian.denoise, x_0, time_grid(100)[::-1], method="heun")
    np.testing.assert_allclose(back, eps, atol=5e-3)


@pytest.mark.parametrize("split", [1, 3, 6])
def test_two_chained_calls_over_split_times_equal_one(gaussian, method, split):
    def denoise(x_t, t, i, carry):  # depends on all that a denoiser may depend on
        v = gaussian.velocity(x_t, t) + 0.1 * i + 0.01 * carry["calls"]
        return v, {"calls": carry["calls"] + 1, "last": v}

    times = time_grid(7)
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 3))
    carry = {"calls": jnp.float32(0), "last": jnp.zeros_like(x)}
    whole = sample(denoise, x, times, carry, method)
    half = sample(denoise, x, times[: split + 1], carry, method)
    chained = sample(denoise, half[0], times[split:], half[1], method, start=split)
    jax.tree.map(np.testing.assert_array_equal, whole, chained)


def test_denoise_sees_each_time_for_the_whole_batch_with_its_index(method):
    calls = {"euler": 1, "heun": 2}[method]

    def denoise(x_t, t, i, carry):
        count, seen_t, seen_i = carry
        assert t.shape == (2,) and t.dtype == jnp.float32
        return jnp.zeros_like(x_t), (count + 1, seen_t.at[count].set(t), seen_i.at[count].set(i))

    times = time_grid(3, 2.0)
    carry = (jnp.int32(0), jnp.zeros((3 * calls, 2)), jnp.zeros(3 * calls, jnp.int32))
    _, (count, seen_t, seen_i) = sample(denoise, jnp.ones((2, 4)), times, carry, method, start=5)
    ends = np.stack([times[:-1], times[1:]], axis=1)[:, :calls].ravel()  # Heun looks at both ends of an interval
    assert count == 3 * calls
    np.testing.assert_array_equal(seen_t, np.stack([ends, ends], axis=1))
    assert seen_i.dtype == jnp.int32
    np.testing.assert_array_equal(seen_i, {"euler": [5, 6, 7], "heun": [5, 6, 6, 7, 7, 8]}[method])
    np.testing.assert_array_equal(times[seen_i - 5], seen_t[:, 0])


@pytest.mark.parametrize("shape", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("method", ["euler", "heun", "renoise"])
@pytest.mark.parametrize("schedule", [VPSchedule(), EDMSchedule()], ids=["vp", "edm"])
def test_chained_calls_that_read_their_level_from_a_grid_equal_one(schedule, method, split, shape):
    grid = schedule.grid(5)

    def denoise(x_t, t, i, carry):
        level = grid.at(i, x_t.shape[0])
        output = jnp.sin(schedule.network_input(x_t, level) + expand_like(level.time, x_t))
        return schedule.velocity(output, x_t, level, "v"), carry.at[i].add(level.time[0] + jnp.sum(level.t - t))

    noise = jax.random.normal(jax.random.key(0), (6, 2, *shape))
    x = schedule.initial(noise[0], grid)
    more = {"method": method, "noise": noise[1:]} if method == "renoise" else {"method": method}
    whole = sample(denoise, x, grid.t, jnp.zeros(6), **more)
    if method == "renoise":
        more["noise"] = noise[1 : 1 + split]
    half = sample(denoise, x, grid.t[: split + 1], jnp.zeros(6), **more)
    if method == "renoise":
        more["noise"] = noise[1:]
    chained = sample(denoise, half[0], grid.t[split:], half[1], start=split, **more)
    jax.tree.map(np.testing.assert_array_equal, whole, chained)
    calls = {"euler": [1, 1, 1, 1, 1, 0], "heun": [1, 2, 2, 2, 2, 1], "renoise": [1, 1, 1, 1, 1, 0]}[method]
    np.testing.assert_allclose(whole[1], calls * np.asarray(grid.time), rtol=1e-6)


def test_one_step_along_a_straight_path_is_exact(method):
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 2))
    x, _ = sample(lambda x_t, t, i, carry: (eps - x_0, carry), eps, time_grid(1), method=method)
    np.testing.assert_allclose(x, x_0, atol=1e-6)


def test_a_denoiser_that_divides_by_time_ends_heun_with_a_chained_euler_step():
    def to_a_point(x_t, t, i, carry):  # data at one point: v = (x_t - point) / t, undefined at t = 0
        return (x_t - 3.0) / expand_like(t, x_t), carry

    times = time_grid(6)
    eps = jax.random.normal(jax.random.key(0), (4, 2, 3))
    x, _ = sample(to_a_point, eps, times[:-1], method="heun")
    x, _ = sample(to_a_point, x, times[-2:], method="euler", start=5)
    np.testing.assert_allclose(x, 3.0, atol=1e-5)


def test_the_state_is_float32_whatever_the_network_computes_in(method):
    v = jnp.full((2, 3), 1.0, jnp.bfloat16)
    x, _ = sample(lambda x_t, t, i, carry: (v, carry), jnp.zeros((2, 3), jnp.bfloat16), time_grid(300), method=method)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, -1.0, atol=1e-5)  # bfloat16 steps of 1/300 would stall at 1/2


def test_renoising_jumps_to_the_data_and_back_to_the_next_time_with_one_call_an_interval():
    # Data ~ N(0, s): E[x_0 | x_t] = k_t x_t with k_t = (1-t) s / ((1-t)^2 s + t^2): three jumps are one product.
    s, times = 0.3, np.array([1.0, 0.6, 0.25, 0.0], np.float32)
    k = {float(t): (1 - t) * s / ((1 - t) ** 2 * s + t**2) for t in times[:-1]}
    eps = jax.random.normal(jax.random.key(0), (4, 5, 2, 3))

    def denoise(x_t, t, i, calls):
        mean = (1 - t) * s / ((1 - t) ** 2 * s + t**2)
        return (x_t - expand_like(mean, x_t) * x_t) / expand_like(t, x_t), calls + 1

    x, calls = sample(denoise, eps[0], times, 0, method="renoise", noise=eps[1:])
    expected = eps[0]
    for i, (t, to) in enumerate(itertools.pairwise(times)):
        expected = (1 - to) * k[float(t)] * expected + to * eps[1 + i]
    assert calls == 3
    np.testing.assert_allclose(x, expected, atol=1e-6)

    half, _ = sample(denoise, eps[0], times[:2], 0, method="renoise", noise=eps[1:2])
    chained, _ = sample(denoise, half, times[1:], 0, method="renoise", noise=eps[1:], start=1)
    np.testing.assert_array_equal(chained, x)


def test_renoising_without_the_noise_it_needs_is_refused_with_the_shape():
    with pytest.raises(ValueError, match=r"noise of shape \(2, 1, 2\).*none was given"):
        sample(lambda x_t, t, i, carry: (x_t, carry), jnp.ones((1, 2)), time_grid(2), method="renoise")


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'rk4'.*euler, heun, renoise"):
        sample(lambda x_t, t, i, carry: (x_t, carry), jnp.ones((1, 2)), time_grid(2), method="rk4")
