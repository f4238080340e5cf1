"""Stored latents and text states: what a batch of them is, and that flow matching learns from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import inference_weights, train
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.inputs.stored import CONTEXT, StoredConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from tests.recipes_for_tests import ONE_STAGE

CONFIG = FlowMatchingConfig(
    batch_size=16,
    train_steps=60,
    network=UNetConfig.preset("smoke", **ONE_STAGE),
    inputs=StoredConfig(
        image_sizes=((64, 64),), latent_channels=4, context_tokens=3, context_width=16, pooled_width=16
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
)


def stored(**changes):
    """The inputs by themselves."""
    return dataclasses.replace(CONFIG.inputs, **changes).build(CONFIG.batch_size, "cpu")


def recipe(**changes):
    """The recipe on such inputs."""
    inputs = dataclasses.replace(CONFIG.inputs, **changes)
    return FlowMatching(dataclasses.replace(CONFIG, inputs=inputs), "cpu")


def batch(seed):
    """Latents of one level each, which the text states tell."""
    rng = np.random.default_rng(seed)
    level = rng.normal(size=(16, 1)).astype(jnp.bfloat16)
    return {
        "latent": np.broadcast_to(level[:, None, None], (16, 8, 8, 4)),
        "sequence": np.broadcast_to(level[:, None], (16, 3, 16)),
        "mask": np.ones((16, 3), np.float32),
        "pooled": np.broadcast_to(level, (16, 16)),
    }


def test_it_fulfils_the_protocol():
    made = recipe()
    assert isinstance(made, Recipe) and isinstance(made.inputs, Inputs)
    assert made.trains == {"model": ("unet",)} and made.frozen_spec() == {}


def test_it_learns_to_draw_the_latents_that_the_states_tell():
    made = recipe(caption_dropout=0.0)
    state = train(made, (batch(n) for n in range(1000)), steps=60, quiet=True)
    loss = jax.jit(made.validation_loss)
    fresh = {"model": jax.jit(made.init)(key(0, 0, "init")).players["model"].params}
    before, after = (
        loss(weights, {}, batch(99), jax.random.key(5))["mean"].mean()
        for weights in (fresh, {"model": state.players["model"].params})
    )
    assert after < 0.8 * before
    conditions = {name: jnp.asarray(batch(7)[name][:4]) for name in made.conditions()}
    options = dataclasses.replace(made.options, steps=2, guidance=2.0)
    draw, keys = jax.jit(made.generate, static_argnums=4), example_keys(0, jnp.arange(4))
    drawn = draw(inference_weights(state), {}, conditions, keys, options)
    assert "image" not in drawn, "there is no decoder"
    assert drawn["latent"].shape == (4, 8, 8, 4)


def test_dropped_captions_are_masked_zeros_at_the_given_rate():
    made = recipe(caption_dropout=0.25)
    big = {name: np.concatenate([array] * 128) for name, array in batch(0).items()}
    drawn = jax.jit(made.draw)({}, big, jax.random.key(0))["condition"]
    dropped = ~np.asarray(drawn["mask"]).any(axis=1)
    assert abs(dropped.mean() - 0.25) < 0.03
    assert not np.asarray(drawn["sequence"], np.float32)[dropped].any()
    assert not np.asarray(drawn["pooled"], np.float32)[dropped].any()


def test_a_size_that_the_autoencoder_cannot_halve_is_refused():
    with pytest.raises(ValueError, match=r"\(60, 64\) does not divide by reduction=8"):
        recipe(image_sizes=((60, 64),))


def test_states_of_another_width_than_the_network_attends_to_are_refused():
    with pytest.raises(
        ValueError, match=r"the context is 20 wide, but network.context_width is 16; .*, or change inputs.context_width"
    ):
        recipe(context_width=20)
    with pytest.raises(ValueError, match=r"the pooled text is 20 wide, but network.pooled_width is 16"):
        recipe(pooled_width=20)


# --- the inputs by themselves ----------------------------------------------------------------------------------------


def test_a_prefix_names_every_array_of_a_batch():
    plain, named = stored(), stored(prefix="teacher_")
    assert named.batch_specs()["64x64"] == {f"teacher_{k}": s for k, s in plain.batch_specs()["64x64"].items()}
    assert named.conditions() == tuple(f"teacher_{name}" for name in plain.conditions())
    arrays, dropped = batch(0), {"text": np.arange(16) % 2 == 0}
    both = [
        (made.clean({}, given), made.draw_condition({}, given, jax.random.key(0), dropped))
        for made, given in ((plain, arrays), (named, {f"teacher_{k}": a for k, a in arrays.items()}))
    ]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_without_latent_channels_it_brings_no_latent():
    assert set(stored(latent_channels=0).batch_specs()["64x64"]) == set(CONTEXT)
    assert set(stored().batch_specs()["64x64"]) == {"latent", *CONTEXT}


def test_what_is_dropped_equals_the_null_condition():
    made = stored()
    told = made.draw_condition({}, batch(0), jax.random.key(0), {"text": np.zeros(16, bool)})
    null = made.null_condition({})
    for given, expected in zip(*map(jax.tree.leaves, (made.condition({}, told), null)), strict=True):
        assert given.dtype == jnp.float32
        np.testing.assert_array_equal(given, np.broadcast_to(expected, given.shape))


def test_it_keeps_the_text_where_another_inputs_keeps_any_of_its_encoders():
    kept = {"clip_l": np.array([1.0, 0.0] * 8), "language": np.array([0.0, 0.0, 1.0, 0.0] * 4)}
    told = stored().draw_condition({}, batch(0), jax.random.key(0), kept)
    np.testing.assert_array_equal(told["mask"].any(axis=1), [True, False] * 8)


def test_nothing_is_dropped_where_nothing_is_said():
    told = stored(caption_dropout=1.0).draw_condition({}, batch(0), jax.random.key(0), {})
    jax.tree.map(np.testing.assert_array_equal, told, {name: batch(0)[name] for name in CONTEXT})


def test_it_has_no_codec_and_says_what_to_do_and_its_bundle_takes_the_text_states():
    with pytest.raises(ConfigError, match="name the autoencoder that made them"):
        stored().codec({})
    brought = stored().exports()
    assert tuple(brought.null) == CONTEXT and brought.codec is None and not brought.encoders
