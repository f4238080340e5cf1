"""Images and captions: which rows lose their caption, and what they are told instead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import init
from tests.recipes_for_tests import GREY_TOKENS, greys

CONFIG = CaptionsConfig(
    image_sizes=((8, 8), (8, 16)),
    text=ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS),
    codec=CodecConfig(patch=2),
)
EVERY_OTHER = np.arange(8) % 2 == 0


def captions(**changes):
    return dataclasses.replace(CONFIG, **changes).build(8, "cpu")


@pytest.fixture(scope="module")
def networks():
    return {"text": init(captions().networks()["text"], jax.random.key(0))}


def test_a_bucket_is_an_image_size_and_holds_what_the_condition_reads():
    made = captions()
    specs = made.batch_specs()
    assert [specs[bucket]["image"].shape for bucket in ("8x8", "8x16")] == [(8, 8, 8, 3), (8, 8, 16, 3)]
    assert all(spec[name].shape == (8, GREY_TOKENS) for spec in specs.values() for name in made.conditions())
    assert made.latent_shape() == (4, 4, 12) and made.latent_shape((8, 16)) == (4, 8, 12)


def test_a_dropped_caption_equals_the_empty_one(networks):
    made = captions()
    told = made.draw_condition(networks, greys(), jax.random.key(0), {"text": EVERY_OTHER})
    context, null = made.condition(networks, told), made.null_condition(networks)
    for given, expected in zip(jax.tree.leaves(context), jax.tree.leaves(null), strict=True):
        expected = np.broadcast_to(expected, given.shape)
        np.testing.assert_allclose(given[~EVERY_OTHER], expected[~EVERY_OTHER], atol=1e-6)
    np.testing.assert_array_equal(told["tokens"][EVERY_OTHER], greys()["tokens"][EVERY_OTHER])


def test_what_the_student_drops_its_teacher_drops_too(networks):
    student, teacher = captions(caption_dropout=0.5), captions(caption_dropout=0.0)
    kept = student.draw_kept(jax.random.key(1), 8)
    assert 0 < int(kept["text"].sum()) < 8
    told = [made.draw_condition(networks, greys(), jax.random.key(2), kept) for made in (student, teacher)]
    jax.tree.map(np.testing.assert_array_equal, *told)
    np.testing.assert_array_equal(told[1]["tokens"][:, 1] == 2, ~np.asarray(kept["text"]))


def test_a_teacher_keeps_the_caption_where_the_student_keeps_any_encoder(networks):
    kept = {"clip_l": jnp.asarray(EVERY_OTHER, jnp.float32), "language": jnp.zeros(8)}
    told = captions().draw_condition(networks, greys(), jax.random.key(0), kept)
    np.testing.assert_array_equal(told["tokens"][:, 1] != 2, EVERY_OTHER)


def test_nothing_is_dropped_where_nothing_is_said(networks):
    told = captions(caption_dropout=1.0).draw_condition(networks, greys(), jax.random.key(0), {})
    jax.tree.map(np.testing.assert_array_equal, told, {name: greys()[name] for name in ("tokens", "mask")})


def test_a_text_encoder_of_an_earlier_run_is_frozen_and_brings_its_tokenizer():
    own, earlier = captions(), captions(text_workdir="clip")
    assert own.pretrained() == () and earlier.pretrained() == ("text",)
    assert own.tokenizers()["tokens"].workdir == "" and earlier.tokenizers()["tokens"].workdir == "clip"


def test_pixels_survive_the_way_to_latents_and_back(networks):
    made, image = captions(), greys()["image"]
    x_0 = made.clean(networks, greys())
    assert x_0.shape == (8, *made.latent_shape()) and x_0.dtype == jnp.float32
    np.testing.assert_array_equal(made.decode(networks, x_0)["image"], image)
