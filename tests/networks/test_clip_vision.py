"""The image encoder: it sees the whole image and where things are, and holds no idle parameter."""

import jax
import jax.numpy as jnp
import pytest

from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.module import apply, build
from tests.networks.tiny import drawn, outputs_without_each_leaf

CONFIG = ClipVisionConfig.preset("smoke")
NETWORK, _ = build(CONFIG)
PARAMS = drawn(NETWORK)
IMAGES = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1, maxval=1)


def test_every_patch_and_its_place_change_the_embedding_of_its_image_alone():
    before = apply(NETWORK, PARAMS, IMAGES)
    assert before.shape == (2, CONFIG.projection)
    for change in (IMAGES.at[0, 24:, 24:].mul(-1), IMAGES.at[0].set(jnp.roll(IMAGES[0], 8, axis=0))):
        after = apply(NETWORK, PARAMS, change)
        assert jnp.abs(after[0] - before[0]).max() > 1e-4
        assert jnp.abs(after[1] - before[1]).max() < 1e-6


def test_every_parameter_changes_the_embedding():
    whole = apply(NETWORK, PARAMS, IMAGES)
    for name, without in outputs_without_each_leaf(lambda p: apply(NETWORK, p, IMAGES), PARAMS).items():
        assert jnp.abs(without - whole).max() > 1e-6, name


def test_another_image_size_is_refused():
    with pytest.raises(ValueError, match="image_size=32"):
        apply(NETWORK, PARAMS, IMAGES[:, :24, :24])
