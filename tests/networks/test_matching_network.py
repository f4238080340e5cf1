"""Image-text matching: bounded, differentiable by the image, and blind to padding and to the size of the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.layers import Linear
from snapgen_jax.networks.matching import MOST, Look, MatchingConfig
from snapgen_jax.networks.module import apply, build, init, rngs_of

CONFIG = MatchingConfig.preset("smoke", text=ClipTextConfig.preset("smoke", attention="full"))
NETWORK, _ = build(CONFIG)
TOKENS = jnp.array([[1, 5, 6, 2, 0, 0], [1, 7, 2, 0, 0, 0]], jnp.int32)


@pytest.fixture(scope="module")
def params():
    drawn = jax.jit(lambda key: init(NETWORK, key))(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), drawn)


def pictures(size=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((2, size, size, 3)), jnp.float32)


def test_it_is_the_probability_of_its_logits(params):
    logits = apply(NETWORK, params, pictures(), TOKENS, method="logits")
    matched = apply(NETWORK, params, pictures(), TOKENS)
    assert matched.shape == (2,) and matched.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(matched, 1 / (1 + np.exp(-np.asarray(logits, np.float64))), rtol=1e-5)


def test_it_stays_within_its_bounds_and_keeps_a_gradient_however_sure_it_is(params):
    sure = {**params, "head": jax.tree.map(lambda x: 30 * x + 30, params["head"])}
    logits, gradient = jax.value_and_grad(lambda x: apply(NETWORK, sure, x, TOKENS, method="logits").sum())(pictures())
    assert 0.5 * MOST < jnp.abs(logits) / 2 <= MOST
    matched = apply(NETWORK, sure, pictures(), TOKENS)
    assert ((matched > 0) & (matched < 1)).all() and jnp.isfinite(gradient).all()


def test_its_gradient_by_the_image_is_that_of_its_differences(params):
    def reward(images):
        return apply(NETWORK, params, images, TOKENS).sum()

    images, direction = pictures(), pictures(seed=1) - 0.5
    step = 1e-2
    difference = (reward(images + step * direction) - reward(images - step * direction)) / (2 * step)
    slope = jnp.sum(jax.grad(reward)(images) * direction)
    assert abs(slope) > 1e-4
    np.testing.assert_allclose(slope, difference, rtol=2e-2)


def test_padding_counts_for_nothing_and_words_for_something(params):
    alone = apply(NETWORK, params, pictures(), TOKENS, method="logits")
    longer = jnp.pad(TOKENS, ((0, 0), (0, 2)))
    np.testing.assert_allclose(apply(NETWORK, params, pictures(), longer, method="logits"), alone, atol=1e-5)
    others = apply(NETWORK, params, pictures(), TOKENS.at[:, 1].add(1), method="logits")
    assert jnp.abs(others - alone).min() > 1e-4


def test_an_image_of_another_size_is_resized(params):
    large = pictures(16)
    small = jax.image.resize(large, (2, 8, 8, 3), "linear")
    matched = [apply(NETWORK, params, images, TOKENS, method="logits") for images in (large, small, pictures())]
    np.testing.assert_allclose(matched[0], matched[1], atol=1e-5)
    assert jnp.abs(matched[0] - matched[2]).min() > 1e-4


def test_one_image_is_looked_at_once_for_several_texts(params):
    cells = apply(NETWORK, params, pictures(), method="see")
    assert cells.shape == (2, CONFIG.cells**2, CONFIG.text.width)
    both = apply(NETWORK, params, cells, TOKENS[::-1], method="compare")
    np.testing.assert_allclose(both, apply(NETWORK, params, pictures(), TOKENS[::-1], method="logits"), atol=1e-5)


def test_a_word_is_told_where_its_cell_is_and_how_well_it_answers():
    """Against attention written out, and with scores that are all lower: the same place, and another answer."""
    look = Look(4, 2, jnp.float32, rngs_of(jax.random.key(0), None))
    x, cells = (jnp.asarray(np.random.default_rng(n).normal(size=(1, n, 4)), jnp.float32) for n in (3, 5))
    q, k, v = (np.asarray(part)[0] for part in (look.query(x), look.key(cells), look.value(cells)))
    seen, answers = np.zeros((3, 4)), np.zeros((3, 2))
    for head in range(2):
        part = slice(2 * head, 2 * head + 2)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(2))
        seen[:, part] = scores @ v[:, part] / scores.sum(axis=1, keepdims=True)
        answers[:, head] = np.log(scores.mean(axis=1))
    by_hand = look.out(jnp.asarray(seen, jnp.float32)) + look.answer(jnp.asarray(answers, jnp.float32))
    np.testing.assert_allclose(look(x, cells)[0], by_hand, atol=1e-5)
    assert isinstance(look.answer, Linear)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "channels=.. halve the image 0 times"),
        ({"channels": (8, 8), "image_size": 10}, "image_size=10 does not divide by 4"),
        ({"groups": 3}, r"groups=3 do not divide channels=\[8\]"),
        ({"heads": 3}, r"3 heads do not divide text.width=16"),
    ],
)
def test_widths_and_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MatchingConfig.preset("smoke", **changes)
