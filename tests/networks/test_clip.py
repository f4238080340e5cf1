"""The CLIP text encoder: what a token can see, which state is pooled, and no idle parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.clip import ClipTextConfig, null_tokens
from snapgen_jax.networks.module import apply, build, init
from tests.networks.tiny import drawn, outputs_without_each_leaf

CONFIG = ClipTextConfig.preset("smoke")  # eight tokens: BOS 1, EOS 2, padding 0
TOKENS = np.array([[1, 7, 9, 4, 2, 0, 0, 0], [1, 31, 5, 2, 0, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]], np.float32)


def encode(tokens=TOKENS, mask=MASK, **changes):
    network, _ = build(ClipTextConfig.preset("smoke", **changes))
    return jax.jit(lambda params: apply(network, params, tokens, mask))(drawn(network))


@pytest.mark.parametrize("changes", [{}, {"output": "penultimate"}, {"neighbours": 2}])
def test_a_later_token_does_not_change_an_earlier_state(changes):
    before = encode(**changes).sequence
    changed = TOKENS.copy()
    changed[:, 3] = 11
    after = encode(changed, **changes).sequence
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (jnp.abs(after - before).max(axis=-1)[:, 3:] > 1e-4).all(), "it changes its own state and all later ones"


def test_with_full_attention_a_later_token_changes_earlier_states():
    changed = TOKENS.copy()
    changed[:, 3] = 11
    difference = jnp.abs(encode(changed, attention="full").sequence - encode(attention="full").sequence)
    assert (difference.max(axis=-1)[MASK == 1] > 1e-4).all()


def test_neighbours_tell_the_order_of_words_before_any_attention():
    swapped = TOKENS.copy()
    swapped[0, 1:4] = TOKENS[0, [3, 2, 1]]  # the middle word keeps its place
    options = {"attention": "full", "layers": 1, "output": "penultimate"}  # the state before the only layer
    same, told = (
        jnp.abs(encode(swapped, **options, **more).sequence - encode(**options, **more).sequence)[0, 2].max()
        for more in ({}, {"neighbours": 1})
    )
    assert same == 0 and told > 0.01


FULL = {"attention": "full", "neighbours": 2}


@pytest.mark.parametrize("changes", [{}, {"neighbours": 2}, FULL])
def test_padding_changes_neither_the_states_of_the_text_nor_its_pooled_vector(changes):
    before = encode(**changes)
    changed = np.where(MASK == 1, TOKENS, 17).astype(np.int32)
    after = encode(changed, **changes)
    np.testing.assert_array_equal(after.pooled, before.pooled)
    np.testing.assert_array_equal(after.sequence[MASK == 1], before.sequence[MASK == 1])
    np.testing.assert_array_equal(after.mask, MASK)


def test_the_pooled_vector_is_the_projected_state_of_the_first_end_token():
    network, _ = build(CONFIG)
    tokens = np.array([[1, 7, 2, 30, 2, 2, 0, 0]], np.int32)
    context = encode(tokens, MASK[:1])
    projected = context.sequence @ drawn(network)["projection"]["kernel"]
    np.testing.assert_allclose(context.pooled[0], projected[0, 2], atol=1e-5)


def test_pooling_by_the_largest_id_takes_the_state_there():
    network, _ = build(CONFIG)
    tokens = np.array([[1, 7, 2, 30, 2, 2, 0, 0]], np.int32)
    context = encode(tokens, MASK[:1], pooling="argmax")
    projected = context.sequence @ drawn(network)["projection"]["kernel"]
    np.testing.assert_allclose(context.pooled[0], projected[0, 3], atol=1e-5)


def test_without_a_projection_the_pooled_vector_is_the_state_itself():
    context = encode(projection=None)
    np.testing.assert_allclose(context.pooled[0], context.sequence[0, 4], atol=1e-6)


def test_the_activation_is_the_one_named():
    quick, exact = encode(activation="quick_gelu"), encode(activation="gelu")
    difference = jnp.abs(quick.sequence - exact.sequence).max()
    assert 1e-4 < difference < 0.1, "they approximate each other and are not the same"


def test_every_parameter_has_an_effect():
    network, _ = build(CONFIG)

    def output(params):
        context = apply(network, params, TOKENS, MASK)
        return jnp.concatenate([context.sequence.ravel(), context.pooled.ravel()])

    params = drawn(network)
    whole = output(params)
    for name, without in outputs_without_each_leaf(output, params).items():
        assert jnp.abs(without - whole).max() > 1e-5, f"{name} has no effect"


def test_bfloat16_computes_and_hands_out_float32_close_to_float32():
    exact, rounded = encode(), encode(dtype="bfloat16")
    assert rounded.sequence.dtype == rounded.pooled.dtype == jnp.float32
    error = jnp.linalg.norm(rounded.sequence - exact.sequence) / jnp.linalg.norm(exact.sequence)
    assert 0 < error < 0.03


def test_wide_embeddings_tell_tokens_apart_from_the_start():
    def distinct(std):
        """Share of the variance of the first states that two texts, which differ in one token, do not share there."""
        network, _ = build(ClipTextConfig.preset("smoke", embedding_std=std, layers=2))
        params = init(network, jax.random.key(0))
        changed = TOKENS.copy()
        changed[:, 2] = 20
        a, b = (apply(network, params, tokens, MASK).sequence[:, 2] for tokens in (TOKENS, changed))
        return float(jnp.square(a - b).mean() / jnp.square(a).mean())

    assert distinct(1.0) > 1.1 * distinct(0.02)


def test_the_null_text_is_begin_end_and_padding():
    tokens, mask = null_tokens(CONFIG, 5)
    assert tokens.tolist() == [1, 2, 0, 0, 0] and mask.tolist() == [1, 1, 0, 0, 0]
    assert tokens.dtype == np.int32 and mask.dtype == np.float32
    large = ClipTextConfig.preset("clip_l")
    assert null_tokens(large, 4)[0].tolist() == [49406, 49407, 49407, 49407]


def test_a_text_longer_than_the_table_of_positions_is_refused():
    with pytest.raises(ValueError, match="9 tokens given, but max_tokens=8"):
        encode(np.zeros((1, 9), np.int32), np.zeros((1, 9), np.float32))
