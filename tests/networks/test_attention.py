"""Attention equals JAX's own for every number of key heads; positions turn with the row and the column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snapgen_jax.networks.attention import Attention, rope_table, rotate
from snapgen_jax.networks.attention_kernels import attend, causal_bias, mask_bias


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_jax_for_multi_head_grouped_and_multi_query(kv_heads):
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, kv_heads, 8, seed=1), normal(2, 7, kv_heads, 8, seed=2)
    np.testing.assert_allclose(attend(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-6)


def test_a_masked_key_has_no_weight_and_a_causal_bias_hides_the_future():
    q, k, v = normal(2, 5, 4, 8), normal(2, 5, 1, 8, seed=1), normal(2, 5, 1, 8, seed=2)
    mask = jnp.array([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :] > 0)
    np.testing.assert_allclose(attend(q, k, v, mask_bias(mask)), expected, atol=1e-6)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(attend(q, k, v, causal_bias(5)), expected, atol=1e-6)


def test_softmax_is_float32_whatever_the_inputs_are():
    q, k, v = (normal(1, 64, 1, 8, seed=s).astype(jnp.bfloat16) for s in range(3))
    y = attend(q, k, v)
    exact = attend(*(a.astype(jnp.float32) for a in (q, k, v)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02)


def test_rotary_scores_depend_on_the_difference_of_positions_alone_in_rows_and_in_columns():
    height, width, dim = 4, 6, 16
    q, k = (
        jnp.tile(normal(1, 1, 1, dim), (1, height * width, 1, 1)),
        jnp.tile(normal(1, 1, 1, dim, seed=1), (1, 24, 1, 1)),
    )
    table = rope_table(height, width, dim)
    scores = jnp.einsum("blhd,bmhd->lm", rotate(q, table), rotate(k, table)).reshape(height, width, height, width)
    np.testing.assert_allclose(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-5)
    assert abs(scores[0, 0, 0, 1] - scores[0, 0, 1, 0]) > 1e-3, "a step right is not a step down"
    assert abs(scores[0, 0, 0, 1] - scores[0, 0, 0, 2]) > 1e-3
    norms = jnp.linalg.norm(rotate(q, table), axis=-1)
    np.testing.assert_allclose(norms, jnp.linalg.norm(q, axis=-1), rtol=1e-6)


def test_rotary_frequencies_are_those_of_the_paper():
    cos, sin = rope_table(3, 5, 8, theta=100.0)
    position = 2 * 5 + 3  # row 2, column 3
    angles = np.array([2 * 1.0, 2 * 0.1, 3 * 1.0, 3 * 0.1])
    np.testing.assert_allclose(cos[position], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[position], np.sin(angles), atol=1e-6)


def test_queries_and_keys_are_normalised_so_that_their_scale_does_not_matter():
    x, context = normal(2, 3, 8), normal(2, 4, 6, seed=1)
    layer = Attention(8, 2, 4, context_width=6, kv_heads=1, qk_norm=True, rngs=nnx.Rngs(0))
    before = layer(x, context)
    layer.query.kernel[...] *= 100.0
    layer.key.kernel[...] *= 100.0
    np.testing.assert_allclose(layer(x, context), before, atol=1e-3)


def test_a_bias_of_the_keys_changes_nothing_which_is_why_ours_have_none():
    x = normal(2, 5, 8)
    layer = Attention(8, 2, 4, qkv_bias=True, key_bias=True, rngs=nnx.Rngs(0))
    before = layer(x)
    layer.key.bias[...] = normal(8, seed=3)
    np.testing.assert_allclose(layer(x), before, atol=1e-5)


def test_key_heads_that_do_not_divide_the_heads_and_odd_rotary_widths_are_refused():
    with pytest.raises(ValueError, match="3 key heads do not divide 4"):
        Attention(16, 4, 4, kv_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_table(2, 2, 6)
