"""Classifier-free guidance: its identities, its closed form on Gaussians, one fused call a step, its band of times."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snapgen_jax.diffusion.guidance import check_interval, draw_kept, guided, guided_times, keep, with_guidance
from snapgen_jax.diffusion.path import expand_like
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.timesteps import time_grid
from snapgen_jax.networks.text import TextContext

NULL = TextContext(jnp.zeros((1, 4, 3)), jnp.ones((1, 4)), jnp.full((1, 5), -1.0))


def contexts(batch):
    a, b, c = jax.random.split(jax.random.key(7), 3)
    return TextContext(
        jax.random.normal(a, (batch, 4, 3)),
        1.0 * jax.random.bernoulli(b, 0.5, (batch, 4)),
        jax.random.normal(c, (batch, 5)),
    )


def network(x_t, t, i, carry, context):
    """Reads every part of its condition, and counts its calls."""
    text = jnp.mean(context.sequence, (1, 2)) + jnp.sum(context.mask, 1) + context.pooled[:, 0]
    return jnp.sin(x_t) * expand_like(text, x_t) + expand_like(t, x_t), carry + 1


def test_scale_zero_is_unconditional_one_is_conditional_and_two_extrapolates():
    v_null, v_cond = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    np.testing.assert_array_equal(guided(v_null, v_cond, 0), v_null)
    np.testing.assert_allclose(guided(v_null, v_cond, 1), v_cond, atol=1e-6)
    np.testing.assert_allclose(guided(v_null, v_cond, 2), v_cond + (v_cond - v_null), atol=1e-6)


def test_each_example_may_have_its_own_scale():
    v_null, v_cond = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    w = jnp.array([0.0, 1.0, 3.0])
    one_by_one = jnp.stack([guided(v_null[b], v_cond[b], w[b]) for b in range(3)])
    np.testing.assert_allclose(guided(v_null, v_cond, w), one_by_one, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 2, 2, 4), 3), ((3, 5, 2, 2, 4), 1), ((3, 2, 2, 4), 0)], ids=["channel", "frame", "example"]
)
def test_a_scale_may_be_any_array_that_broadcasts_to_the_velocity(shape, axis):
    v_null, v_cond = jax.random.normal(jax.random.key(0), (2, *shape))
    w = jnp.linspace(0, 4, shape[axis])
    slices = [guided(jnp.take(v_null, k, axis), jnp.take(v_cond, k, axis), float(w[k])) for k in range(shape[axis])]
    v = guided(v_null, v_cond, w.reshape([-1 if a == axis else 1 for a in range(len(shape))]))
    np.testing.assert_allclose(v, jnp.stack(slices, axis), atol=1e-6)


@pytest.mark.parametrize("shape", [(2,), (4, 4), (1, 1, 4), (3, 2, 2, 5), (2, 3, 2, 2, 4), (1, 1, 1, 1, 4)])
def test_a_scale_that_does_not_fit_the_velocity_is_refused_with_both_shapes(shape):
    v = jnp.ones((3, 2, 2, 4))
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))} does not fit .*\(3, 2, 2, 4\).*one an example"):
        guided(v, v, jnp.ones(shape))


def test_a_guided_sampler_carries_activations_of_both_halves():
    # The network reuses its activations of the step before, so that mixing up the halves would show.
    def cached(x_t, t, i, carry, condition):
        v, _ = network(x_t, t, i, 0, condition)
        return v + 0.5 * carry["v"] + 0.1 * i, {"v": v}

    eps, condition = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)), contexts(3)
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, condition)

    def separately(x_t, t, i, carry):
        v_null, left = cached(x_t, t, i, carry[0], null)
        v_cond, right = cached(x_t, t, i, carry[1], condition)
        return guided(v_null, v_cond, 3.0), (left, right)

    start = {"v": jnp.zeros_like(eps)}
    for method in ("euler", "heun"):
        expected, carries = sample(separately, eps, time_grid(3), (start, start), method)
        both = {"v": jnp.zeros((6, 4, 4, 2))}
        x, carry = sample(with_guidance(cached, condition, NULL, 3.0), eps, time_grid(3), both, method)
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
        for half in (0, 1):
            np.testing.assert_allclose(carry["v"][half::2], carries[half]["v"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.5, jnp.array([0.0, 1.0, 3.5])], ids=["0", "1", "3.5", "each"])
def test_the_fused_call_equals_two_separate_calls(w):
    x_t = jax.random.normal(jax.random.key(0), (3, 2, 2, 3))
    t, condition = jnp.array([0.2, 0.5, 0.9]), contexts(3)
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, condition)
    v, calls = with_guidance(network, condition, NULL, w)(x_t, t, 0, 0)
    v_null, _ = network(x_t, t, 0, 0, null)
    v_cond, _ = network(x_t, t, 0, 0, condition)
    np.testing.assert_allclose(v, guided(v_null, v_cond, w), atol=1e-6)
    assert calls == 1


def test_scale_one_costs_no_second_half():
    sizes = []

    def denoise(x_t, t, i, carry, condition):
        sizes.append((len(x_t), len(t), len(condition.mask)))
        return x_t, carry

    for w in (1, 2.0):
        with_guidance(denoise, contexts(3), NULL, w)(jnp.ones((3, 2)), jnp.ones(3), 0, None)
    assert sizes == [(3, 3, 3), (6, 6, 6)]


def test_guidance_moves_the_mean_of_a_gaussian_in_proportion_to_its_scale(gaussian):
    # Classes that differ only in their mean: the velocity is affine in the mean, so guiding from the mean a to the mean
    # b by w is exactly the velocity of the class with mean a + w (b - a).
    offsets = jnp.array([[1.0], [-2.0]]) * jnp.linspace(-1, 1, 12)

    def denoise(x_t, t, i, carry, offset):
        shifted = x_t - (1 - t)[:, None] * offset
        return gaussian.velocity(shifted, t) - offset, carry

    eps = jax.random.normal(jax.random.key(0), (2, 12))
    guided_denoise = with_guidance(denoise, offsets, jnp.zeros(12), 3.0)
    x, _ = sample(guided_denoise, eps, time_grid(200), method="heun")
    extrapolated = dataclasses.replace(gaussian, mean=gaussian.mean + 3.0 * np.asarray(offsets))
    np.testing.assert_allclose(x, extrapolated.endpoint(eps), atol=5e-3)


# --- a band of times -------------------------------------------------------------------------------------------------

BAND = (0.3, 0.75)  # of the times 1, 3/4, 1/2, 1/4, 0


def test_the_times_of_a_band_are_those_between_its_ends_which_belong_to_it():
    times = time_grid(4)
    np.testing.assert_array_equal(guided_times(times, BAND), [False, True, True, False, False])
    np.testing.assert_array_equal(guided_times(times, (0.25, 0.5)), [False, False, True, True, False])
    assert guided_times(times, (0.0, 1.0)).all()
    tenths = time_grid(10)  # 0.1 is another number in float32, and the same time
    assert guided_times(tenths, (0.1, 0.8)).tolist() == [0.05 < t < 0.85 for t in tenths]


@pytest.mark.parametrize("interval", [(0.8, 0.1), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_what_is_no_band_of_times_is_refused(interval):
    with pytest.raises(ValueError, match=r"give .t_low, t_high. with 0 <= t_low <= t_high <= 1"):
        check_interval(interval)


def test_a_band_without_a_time_of_the_grid_is_refused_with_its_times():
    with pytest.raises(ValueError, match=r"none of the times that are sampled at: 1, 0.75, 0.5, 0.25; widen it"):
        guided_times(time_grid(4), (0.0, 0.2))


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("w", [3.0, jnp.array([0.0, 1.0, 3.5])], ids=["3", "each"])
def test_outside_its_band_the_velocity_is_the_conditional_one(w, method):
    eps, condition = jax.random.normal(jax.random.key(0), (3, 2, 2, 3)), contexts(3)

    def by_hand(x_t, t, i, carry):
        null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, condition)
        v_null, v_cond = network(x_t, t, i, 0, null)[0], network(x_t, t, i, 0, condition)[0]
        inside = expand_like((t >= BAND[0]) & (t <= BAND[1]), x_t)
        return jnp.where(inside, guided(v_null, v_cond, w), v_cond), carry

    def plain(x_t, t, i, carry, condition):
        return network(x_t, t, i, 0, condition)[0], carry

    times = time_grid(4)
    expected, _ = sample(by_hand, eps, times, method=method)
    banded = with_guidance(plain, condition, NULL, w, guided_times(times, BAND))
    x, _ = jax.jit(lambda eps: sample(banded, eps, times, method=method))(eps)
    np.testing.assert_allclose(x, expected, atol=1e-5)
    everywhere, _ = sample(with_guidance(plain, condition, NULL, w), eps, times, method=method)
    assert np.abs(everywhere - x).max() > 0.01


@pytest.mark.parametrize(
    ("method", "rows"),
    [("euler", [3, 6, 6, 3]), ("heun", [3, 6, 6, 6, 6, 3, 3, 3]), ("renoise", [3, 6, 6, 3])],
)
def test_outside_its_band_the_network_is_run_on_the_conditional_half_alone(method, rows):
    """Counted while the compiled program runs: what a branch holds and does not run costs nothing."""
    ran = []

    def denoise(x_t, t, i, carry, condition):
        jax.debug.callback(lambda v: ran.append(len(v)), x_t, ordered=True)
        return network(x_t, t, i, 0, condition)[0], carry

    eps, times = jnp.ones((3, 2, 2, 3)), time_grid(4)
    banded = with_guidance(denoise, contexts(3), NULL, 3.0, guided_times(times, BAND))
    noise = jnp.ones((4, *eps.shape)) if method == "renoise" else None
    jax.jit(lambda eps: sample(banded, eps, times, method=method, noise=noise)[0])(eps).block_until_ready()
    jax.effects_barrier()
    assert ran == rows


def test_activations_of_both_halves_go_on_outside_the_band():
    eps, condition = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)), contexts(3)
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, condition)

    def cached(x_t, t, i, carry, condition):
        v, _ = network(x_t, t, i, 0, condition)
        return v + 0.5 * carry["v"], {"v": v}

    def separately(x_t, t, i, carry):
        v_null, left = cached(x_t, t, i, carry[0], null)
        v_cond, right = cached(x_t, t, i, carry[1], condition)
        inside = expand_like((t >= BAND[0]) & (t <= BAND[1]), x_t)
        return jnp.where(inside, guided(v_null, v_cond, 3.0), v_cond), (left, right)

    start, times = {"v": jnp.zeros_like(eps)}, time_grid(4)
    expected, carries = sample(separately, eps, times, (start, start))
    banded = with_guidance(cached, condition, NULL, 3.0, guided_times(times, BAND))
    x, carry = sample(banded, eps, times, {"v": jnp.zeros((6, 4, 4, 2))})
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
    for half in (0, 1):
        np.testing.assert_allclose(carry["v"][half::2], carries[half]["v"], rtol=1e-4, atol=1e-4)


def test_guiding_a_batch_that_is_split_over_devices_moves_nothing_between_them():
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    batch = 2 * len(jax.devices())
    assert batch > 2, "the claim needs several devices"

    def step(x_t, t, condition):
        return with_guidance(network, condition, NULL, 3.0)(x_t, t, 0, 0)[0]

    arguments = (jnp.ones((batch, 4, 4, 3)), jnp.full(batch, 0.5), contexts(batch))
    program = jax.jit(step, in_shardings=split, out_shardings=split).lower(*arguments).compile().as_text()
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if name in program]


def test_dropped_examples_lose_every_part_of_their_condition_and_the_rest_keep_theirs():
    condition = contexts(4000)
    kept = draw_kept(jax.random.key(3), 4000, 0.1)
    assert kept.shape == (4000,) and kept.dtype == bool
    np.testing.assert_array_equal(kept, ~jax.random.bernoulli(jax.random.key(3), 0.1, (4000,)))
    result = keep(kept, condition, NULL)
    dropped = ~np.asarray(kept)
    assert dropped.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / 4000))
    for new, null, old in zip(jax.tree.leaves(result), jax.tree.leaves(NULL), jax.tree.leaves(condition), strict=True):
        np.testing.assert_array_equal(new[dropped], np.broadcast_to(null, new[dropped].shape))
        np.testing.assert_array_equal(new[~dropped], old[~dropped])


def test_rate_zero_drops_nothing_and_rate_one_everything():
    tokens, null = jnp.arange(12, dtype=jnp.int32).reshape(3, 4), jnp.array([1, 2, 0, 0], jnp.int32)
    np.testing.assert_array_equal(keep(draw_kept(jax.random.key(0), 3, 0.0), tokens, null), tokens)
    everything = keep(draw_kept(jax.random.key(0), 3, 1.0), tokens, null)
    np.testing.assert_array_equal(everything, np.broadcast_to(null, (3, 4)))
    assert everything.dtype == jnp.int32
