"""Weights of few values: the levels, how scales begin, the gradients, and which layers of a network are quantised."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import build, flatten, init
from snapgen_jax.networks.quantise import (
    alternating_scale,
    average_bits,
    bits_of,
    fake_quantised,
    first_scales,
    integers,
    kernel_path,
    level_count,
    level_range,
    min_max_scale,
    quantisable,
    quantised,
    scale_shape,
    stored_integers,
)
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.unet import UNetConfig

ONE_STAGE = {"channels": (8,), "down_depth": (1,), "up_depth": (0,), "self_attention": (True,)}
CONFIG = UNetConfig.preset("smoke", cross_attention=(True,), mid_depth=0, **ONE_STAGE)
LAYERS = quantisable(CONFIG)
SHAPES = {"linear": (6, 5), "conv": (3, 3, 6, 5), "depthwise": (3, 3, 1, 5), "stack": (2, 6, 5)}


@pytest.fixture(scope="module", autouse=True)
def networks_are_quick_to_compile(quick_to_compile):
    """See `quick_to_compile`."""


@functools.cache
def params():
    network, _ = build(CONFIG)
    random = np.random.default_rng(0)
    spec = jax.eval_shape(functools.partial(init, network), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.1 * random.normal(size=x.shape), jnp.float32), spec)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def error(w, scale, low, high):
    return float(jnp.mean((integers(w, scale, low, high) * scale - w) ** 2))


def test_a_balanced_set_has_one_level_more_and_is_symmetric():
    assert [level_range(b) for b in (1, 2, 3)] == [(-1, 1), (-2, 2), (-4, 4)]
    assert [level_range(b, "unbalanced") for b in (1, 2, 3)] == [(-1, 0), (-2, 1), (-4, 3)]
    assert level_range(8) == level_range(8, "unbalanced") == (-127, 127)
    assert [level_count(b) for b in range(1, 8)] == [2**b + 1 for b in range(1, 8)]


# The mean squared error for 2 * 10^5 weights from N(0, 1), and the scale: BitsFusion's sets, computed in NumPy.
@pytest.mark.parametrize(
    ("bits", "levels", "begun", "fitted", "scale"),
    [
        (1, "balanced", 0.938, 0.191, 1.224),
        (2, "balanced", 0.439, 0.083, 0.862),
        (3, "balanced", 0.113, 0.036, 0.647),
        (4, "balanced", 0.028, 0.018, 0.465),
        (1, "unbalanced", 1.002, 0.596, 1.227),
        (2, "unbalanced", 0.679, 0.150, 1.056),
        (3, "unbalanced", 0.148, 0.044, 0.687),
        (4, "unbalanced", 0.032, 0.0196, 0.485),
    ],
)
def test_scales_begin_as_they_should_for_normal_weights(bits, levels, begun, fitted, scale):
    w, (low, high) = normal((200_000, 1)), level_range(bits, levels)
    first = min_max_scale(w, low, high)
    assert error(w, first, low, high) == pytest.approx(begun, rel=0.02)
    after = jax.jit(lambda n: alternating_scale(w, first, low, high, n))
    by_round = [error(w, after(n), low, high) for n in range(11)]
    assert by_round[10] == pytest.approx(fitted, rel=0.02)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(by_round))
    assert after(10)[0] == pytest.approx(scale, rel=0.02)


def test_a_scale_at_which_all_is_zero_is_halved_until_it_is_not():
    w = jnp.concatenate([jnp.full((50, 1), 0.1), jnp.full((1, 1), 5.0), jnp.full((50, 1), -0.1)])
    low, high = level_range(1, "unbalanced")
    first = min_max_scale(w, low, high)
    assert not integers(w, first, low, high).any()  # the one large weight is positive
    fitted = alternating_scale(w, first, low, high)
    np.testing.assert_allclose(fitted, 0.1, rtol=1e-5)
    assert min_max_scale(jnp.zeros((4, 3)), -1, 1).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("levels", ["balanced", "unbalanced"])
def test_gradients_are_those_of_lsq(shape, levels):
    low, high = level_range(2, levels)
    w, scale, g = normal(shape, 1), jnp.abs(normal(scale_shape(shape), 2)) + 0.3, normal(shape, 3)
    bounds = jnp.float32(low), jnp.float32(high)
    used, pull = jax.vjp(lambda w, s: fake_quantised(w, s, *bounds), w, scale)
    by_w, by_scale = pull(g)
    # By hand, one weight at a time.
    spread, n = np.broadcast_to(scale, shape), w.size // scale.size
    expected = np.zeros(shape)
    for index in np.ndindex(shape):
        ratio = float(w[index]) / float(spread[index])
        inside = low <= ratio <= high
        q = float(np.clip(np.round(ratio), low, high))
        assert float(used[index]) == pytest.approx(q * float(spread[index]), rel=1e-6)
        assert float(by_w[index]) == (float(g[index]) if inside else 0.0)
        expected[index] = float(g[index]) * (q - ratio if inside else q) / np.sqrt(n * max(high, 1))
    summed = expected.sum(axis=1, keepdims=True) if len(shape) == 3 else expected.sum(axis=tuple(range(len(shape) - 1)))
    np.testing.assert_allclose(by_scale, summed, rtol=1e-5, atol=1e-6)
    assert (np.asarray(by_w) == 0).any() and (np.asarray(by_w) != 0).any()


def test_bits_as_traced_arrays_give_what_static_ones_do():
    w, one = normal((40, 3)), jax.jit(lambda w, s, low, high: fake_quantised(w, s, low, high))
    for bits in (1, 2, 3):
        low, high = (jnp.float32(x) for x in level_range(bits))
        scale = alternating_scale(w, min_max_scale(w, low, high), low, high)
        np.testing.assert_array_equal(one(w, scale, low, high), integers(w, scale, *level_range(bits)) * scale)
    assert one._cache_size() == 1


def test_depthwise_kernels_and_the_first_and_last_layer_have_eight_bits_and_time_layers_none():
    fixed = {name for name, layer in LAYERS.items() if layer.fixed == 8}
    assert fixed == {name for name in LAYERS if name.endswith("depthwise") or name in ("conv_in", "conv_out")}
    assert not any(name.startswith("time/") for name in LAYERS)
    assert "mid_residual/embedding" in LAYERS  # it sees pooled text, too
    without = quantisable(UNetConfig.preset("smoke", pooled_width=None))
    assert not any("embedding" in name or name.startswith("pooled") for name in without)
    bits = bits_of(LAYERS, {"down/block_00/block_00/transformer/project_in": 3}, default=2)
    assert set(bits.values()) == {2, 3, 8} and bits["conv_in"] == 8
    by_pattern = bits_of(LAYERS, {"*/ffn/*": 1, "*/ffn/outer": 4, "conv_in": 5}, default=2)
    assert {by_pattern[name] for name in LAYERS if "/ffn/" in name} == {1, 4} and by_pattern["conv_in"] == 5


def test_stable_diffusion_has_256_layers_for_choice():
    layers = quantisable(SDUNetConfig.preset("sd15"))
    free = [layer for layer in layers.values() if layer.fixed is None]
    assert len(free) == 256 and len(layers) == 258
    assert sum(layer.size for layer in free) == pytest.approx(831.20e6, abs=5e3)
    assert sum(layer.scales for layer in layers.values()) == 295_684


def test_quantised_parameters_take_the_levels_that_their_bits_have_and_all_else_stays():
    bits = bits_of(LAYERS, {name: 1 + i % 3 for i, name in enumerate(n for n in LAYERS if not LAYERS[n].fixed)}, 2)
    scales = first_scales(params(), bits)
    used = jax.jit(lambda p, s: quantised(p, s, bits))(params(), scales)
    stored = jax.jit(lambda used, s: stored_integers(used, s, bits))(used, scales)
    before, after = flatten(params()), flatten(used)
    for name, b in bits.items():
        q, scale = stored[name]
        low, high = level_range(b)
        assert q.dtype == jnp.int8 and low <= q.min() and q.max() <= high
        assert scale.shape == scale_shape(LAYERS[name].shape) and (scale > 0).all()
        assert b == 8 or len(np.unique(q)) <= 2**b + 1
        np.testing.assert_allclose(q * scale, after[kernel_path(name)], rtol=1e-6)
    untouched = set(before) - {kernel_path(name) for name in bits}
    assert untouched and all((before[path] == after[path]).all() for path in untouched)
    assert {np.unique(stored[name][0]).size for name, b in bits.items() if b == 2 and LAYERS[name].size > 200} == {5}


def test_gradients_reach_weights_and_scales_whatever_the_sign_of_a_scale():
    bits = bits_of(LAYERS, {}, default=2)
    scales = jax.tree.map(lambda s: s.at[0].multiply(-1.0), first_scales(params(), bits))

    def loss(p, s):
        return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(quantised(p, s, bits)))

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    by_params, by_scales = gradients(params(), scales)
    assert all(np.any(flatten(by_params)[kernel_path(name)] != 0) for name in bits)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(by_scales))
    _, flipped = gradients(params(), jax.tree.map(jnp.abs, scales))
    first = [(a[0], b[0]) for a, b in zip(*map(jax.tree.leaves, (by_scales, flipped)), strict=True)]
    assert all(np.allclose(a, -b) for a, b in first)
    used = jax.jit(lambda p, s: stored_integers(quantised(p, s, bits), s, bits))(params(), scales)
    assert all((scale > 0).all() for _, scale in used.values())


def test_scales_know_their_bits_and_average_bits_count_levels():
    names = {path[-1] for path in flatten(first_scales(params(), bits_of(LAYERS, {}, 2)))}
    assert names == {"b2_scale", "b8_scale"}
    name = "down/block_00/block_00/transformer/project_in"
    assert average_bits(LAYERS, {name: 1}) == pytest.approx(1.585, abs=1e-3)
    assert average_bits(LAYERS, {name: 2}) == pytest.approx(2.322, abs=1e-3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"down/block_00/block_00/transformer/project": 2},
            r"no layer whose weights can be quantised; did you mean 'down/",
        ),
        ({"conv_in": 9}, "bits: 'conv_in' has 9; give from 1 to 8"),
        ({"conv_in": 0}, "bits: 'conv_in' has 0; give from 1 to 8"),
    ],
)
def test_bits_that_mean_nothing_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        bits_of(LAYERS, chosen, default=2)
