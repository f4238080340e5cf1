"""Encodings of several encoders become one context, as the teacher and as SnapGen want it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.attention_kernels import attend, mask_bias
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig, draw_kept, join_clip, kept_shares, sd3_context
from snapgen_jax.networks.module import apply, build, count_parameters, flatten, init, unflatten
from snapgen_jax.networks.text import TextContext

B, L, M = 3, 5, 4


def encoding(width, tokens=L, pooled=None, seed=0, batch=B):
    random = np.random.default_rng(seed)
    mask = (np.arange(tokens) < random.integers(2, tokens + 1, (batch, 1))).astype(np.float32)
    arrays = random.standard_normal((batch, tokens, width)), mask, random.standard_normal((batch, pooled or width))
    return TextContext(*(jnp.asarray(array, jnp.float32) for array in arrays))


@pytest.fixture(scope="module")
def conditioner():
    network, _ = build(ConditionerConfig.preset("smoke"))
    params = jax.tree.map(lambda x: x + 0.1, init(network, jax.random.key(0)))
    return network, params


@pytest.fixture(scope="module")
def encodings():
    return encoding(6, seed=1), encoding(10, seed=2), encoding(12, tokens=M, seed=3)


def test_the_teachers_context_is_clip_on_features_padded_with_zeros_then_t5_on_tokens():
    clip_l, clip_g = encoding(768, 77, seed=1, batch=1), encoding(1280, 77, seed=2, batch=1)
    t5 = encoding(4096, 256, seed=3, batch=1)
    context = sd3_context(clip_l, clip_g, t5)
    assert context.sequence.shape == (1, 77 + 256, 4096)
    np.testing.assert_array_equal(context.sequence[:, :77, :768], clip_l.sequence)
    np.testing.assert_array_equal(context.sequence[:, :77, 768:2048], clip_g.sequence)
    assert not context.sequence[:, :77, 2048:].any()
    np.testing.assert_array_equal(context.sequence[:, 77:], t5.sequence)
    np.testing.assert_array_equal(context.mask[:, 77:], t5.mask)
    np.testing.assert_array_equal(context.pooled, jnp.concatenate([clip_l.pooled, clip_g.pooled], axis=-1))
    assert context.pooled.shape == (1, 2048)


def test_snapgens_context_is_clip_on_features_then_the_mapped_language_states_on_tokens(conditioner, encodings):
    clip_l, clip_g, language = encodings
    network, params = conditioner
    context = apply(network, params, *encodings)
    clip = join_clip(clip_l, clip_g)
    np.testing.assert_array_equal(context.sequence[:, :L], clip.sequence)
    x = np.asarray(language.sequence, np.float64)
    normed = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * np.asarray(params["norm"]["scale"])
    expected = normed @ np.asarray(params["linear"]["kernel"]) + np.asarray(params["linear"]["bias"])
    np.testing.assert_allclose(context.sequence[:, L:], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(context.mask, jnp.concatenate([clip.mask, language.mask], axis=1))
    np.testing.assert_array_equal(context.pooled, clip.pooled)


def test_the_full_size_conditioner_maps_gemma_to_the_width_of_both_clips():
    network, spec = build(ConditionerConfig.preset("t2i"))
    assert count_parameters(spec) == 2304 + 2304 * 2048 + 2048
    context = jax.eval_shape(
        lambda *args: apply(network, *args), spec, encoding(768, 77), encoding(1280, 77), encoding(2304, 256)
    )
    assert context.sequence.shape == (B, 77 + 256, 2048)
    assert context.pooled.shape == (B, 2048)


def test_a_dropped_language_model_reads_as_an_absent_one(conditioner, encodings):
    network, params = conditioner
    clip_l, clip_g, _ = encodings
    kept = {"clip_l": jnp.ones(B), "clip_g": jnp.ones(B), "language": jnp.zeros(B)}
    dropped, absent = apply(network, params, *encodings, kept), apply(network, params, clip_l, clip_g)
    assert not dropped.sequence[:, L:].any()
    query = jax.random.normal(jax.random.key(1), (B, 7, 2, 8))

    def read(context):
        states = context.sequence.reshape(*context.sequence.shape[:2], 2, 8)
        return attend(query, states, states, mask_bias(context.mask))

    np.testing.assert_allclose(read(dropped), read(absent), atol=1e-6)


def test_each_example_drops_its_own_encoders(conditioner, encodings):
    network, params = conditioner
    kept = {"clip_l": jnp.array([0.0, 1, 0]), "clip_g": jnp.array([1.0, 1, 0]), "language": jnp.array([1.0, 1, 0])}
    context, whole = apply(network, params, *encodings, kept), apply(network, params, *encodings)
    assert not context.sequence[0, :L, :6].any()
    assert not context.pooled[0, :6].any()
    np.testing.assert_array_equal(context.sequence[0, :, 6:], whole.sequence[0, :, 6:])
    for ours, all_of in zip(jax.tree.leaves(context), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours[1], all_of[1])
        assert not ours[2].any()  # the null context is zeros, all of it masked


@pytest.mark.parametrize(
    ("rates", "none"), [(0.464, None), (0.464, 0.0), ((0.1, 0.3, 0.9), None), ((0.1, 0.3, 0.9), 0.25), (0.0, 0.1)]
)
def test_encoders_are_dropped_as_the_closed_form_says(rates, none):
    batch, d = 40_000, np.broadcast_to(rates, 3)
    kept = draw_kept(jax.random.key(0), batch, kept_shares(rates, none))
    assert tuple(kept) == ENCODERS
    rows = np.stack([kept[name] for name in ENCODERS], axis=1).astype(int)
    for pattern in itertools.product((0, 1), repeat=3):
        independent = np.prod(np.where(pattern, 1 - d, d))
        expected = independent
        if none is not None:
            expected = none if not any(pattern) else independent * (1 - none) / (1 - d.prod())
        assert abs((rows == pattern).all(axis=1).mean() - expected) < 4 * np.sqrt(0.25 / batch), pattern


def test_the_defaults_are_those_of_stable_diffusion_3():
    shares = kept_shares()
    for axis in range(3):
        np.testing.assert_allclose(shares.sum(axis=tuple({0, 1, 2} - {axis})), [0.464, 0.536])
    assert shares[0, 0, 0] == pytest.approx(0.464**3) and shares[1, 1, 0] == pytest.approx(0.536**2 * 0.464)


def test_zeroing_any_parameter_changes_the_context(conditioner, encodings):
    network, params = conditioner
    whole, flat = apply(network, params, *encodings).sequence, flatten(params)
    for path, leaf in flat.items():
        changed = apply(network, unflatten({**flat, path: jnp.zeros_like(leaf)}), *encodings).sequence
        assert not jnp.array_equal(whole, changed), path


def test_encodings_that_do_not_belong_together_are_refused(conditioner):
    network, params = conditioner
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(3, 4\); encode the same texts"):
        join_clip(encoding(6), encoding(10, tokens=4))
    with pytest.raises(ValueError, match="CLIP states of width 16 do not fit into those of T5, which are 12 wide"):
        sd3_context(encoding(6), encoding(10), encoding(12))
    with pytest.raises(ValueError, match="the CLIP states are 12 wide together, but width is 16"):
        apply(network, params, encoding(6), encoding(6))
