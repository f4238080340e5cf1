"""SnapGen's decoder: the published size, no idle parameter, and fit for a phone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks import autoencoder
from snapgen_jax.networks.autoencoder import AutoencoderCodec, AutoencoderConfig
from snapgen_jax.networks.counting import macs, parameters
from snapgen_jax.networks.module import apply, build, for_platform, init
from snapgen_jax.networks.tiny_decoder import TinyDecoderCodec, TinyDecoderConfig
from tests.networks.tiny import drawn, outputs_without_each_leaf

CONFIG = for_platform(TinyDecoderConfig.preset("smoke"), "cpu")
FULL = TinyDecoderConfig.preset("sd3")


@pytest.fixture(scope="module")
def tiny():
    """The smoke decoder away from its start values, and a latent that is not square."""
    network, _ = build(CONFIG)
    latents = np.random.default_rng(0).normal(size=(2, 6, 4, CONFIG.latent_channels)).astype(np.float32)
    return network, drawn(network), jnp.asarray(latents)


def images(network, params, latents):
    return jax.jit(lambda params, latents: apply(network, params, latents))(params, latents)


def test_it_is_the_published_size_and_a_thirty_sixth_of_the_decoder_it_replaces():
    """1.38M parameters (section 3.2); about 87 GMAC at 1024 px."""
    assert parameters(FULL) == 1_380_163
    assert macs(FULL, FULL.input_spec(1, 128, 128)) == pytest.approx(87e9, rel=0.01)
    _, spec = build(AutoencoderConfig.preset("sd3"))
    large = sum(leaf.size for leaf in jax.tree.leaves(spec["decoder"]))
    assert large / parameters(FULL) == pytest.approx(36, abs=0.5)
    assert autoencoder.AutoencoderConfig.preset("sd3").reduction == FULL.reduction == 8


def test_every_parameter_has_an_effect(tiny):
    network, params, latents = tiny
    whole = images(network, params, latents)
    for name, without in outputs_without_each_leaf(lambda p: apply(network, p, latents), params).items():
        assert jnp.abs(without - whole).max() > 1e-5 * jnp.abs(whole).max(), f"{name} has no effect"


@pytest.mark.parametrize("changes", [{}, {"norm": "none"}, {"convolution": "ordinary"}, {"middle_blocks": 0}], ids=str)
def test_each_pixel_of_a_latent_becomes_a_square_of_the_image(changes):
    config = TinyDecoderConfig.preset("smoke", **changes)
    network, spec = build(config)
    shape = jax.eval_shape(lambda p, a: apply(network, p, *a), spec, config.input_spec(3, 6, 4)).shape
    assert shape == (3, 12, 8, 3)


def test_a_fresh_block_is_the_identity():
    config = dataclasses.replace(CONFIG, norm="none")
    more, _ = build(dataclasses.replace(config, blocks=(3, 2), middle_blocks=2))
    fewer, _ = build(dataclasses.replace(config, blocks=(0, 0), middle_blocks=0))
    params = init(more, jax.random.key(0))
    kept = {name: params[name] for name in ("conv_in", "upsamplers", "conv_out")}
    latents = jax.random.normal(jax.random.key(1), (1, 4, 4, config.latent_channels))
    np.testing.assert_array_equal(images(more, params, latents), images(fewer, kept, latents))


def test_both_forms_of_the_depthwise_convolution_give_one_decoder(tiny):
    network, params, latents = tiny
    grouped, _ = build(dataclasses.replace(CONFIG, depthwise="grouped"))
    np.testing.assert_allclose(images(grouped, params, latents), images(network, params, latents), atol=1e-4)


def test_bfloat16_computes_and_hands_out_float32_close_to_float32(tiny):
    network, params, latents = tiny
    rounded, _ = build(dataclasses.replace(CONFIG, dtype="bfloat16"))
    x, exact = images(rounded, params, latents), images(network, params, latents)
    assert x.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact) < 0.05


def test_nothing_has_more_than_four_dimensions():
    config = dataclasses.replace(CONFIG, depthwise="grouped")
    network, spec = build(config)
    text = str(jax.make_jaxpr(lambda p, a: apply(network, p, *a))(spec, config.input_spec(1, 8, 8)))
    assert "feature_group_count=16" in text
    assert max(text.split("f32[")[1:], key=lambda s: s.split("]")[0].count(",")).split("]")[0].count(",") == 3


def test_as_a_codec_it_decodes_what_another_encodes(tiny):
    network, params, _ = tiny
    large, _ = build(for_platform(AutoencoderConfig.preset("smoke"), "cpu"))
    encoder = AutoencoderCodec(large, drawn(large))
    codec = TinyDecoderCodec(network, params, encoder)
    pictures = jax.random.uniform(jax.random.key(0), (2, 1, 16, 8, 3), minval=-1)
    latents = codec.encode(pictures)
    np.testing.assert_array_equal(latents, encoder.encode(pictures))
    assert latents.shape[2:] == codec.latent_shape((16, 8))
    assert codec.decode(latents).shape == pictures.shape
    assert codec.describe() == {"kind": "network", "reduction": 2, "latent_channels": 4}


def test_a_decoder_alone_does_not_encode(tiny):
    network, params, _ = tiny
    codec = TinyDecoderCodec(network, params)
    with pytest.raises(ValueError, match="give it the `encoder`"):
        codec.encode(jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="9 x 8 px: both sides must be multiples of 2"):
        codec.latent_shape((9, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1,)}, r"blocks = \(1,\) has 1 entries and `channels` 2"),
        ({"channels": (16, 6)}, r"groups=4 do not divide stages of \[6\] channels"),
    ],
)
def test_a_config_that_makes_no_decoder_says_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        TinyDecoderConfig.preset("smoke", **changes)
