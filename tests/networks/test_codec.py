"""Codecs: exact inverses, orthonormal, and decodable by a client that has only NumPy and their description."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft

from snapgen_jax.data.shapes import render
from snapgen_jax.data.shapes_grammar import sample_scene
from snapgen_jax.networks.codec import CodecConfig, build_codec, from_uint8, to_uint8
from snapgen_jax.networks.module import build, flatten
from snapgen_jax.networks.tiny_decoder import TinyDecoderCodec, TinyDecoderConfig

WEIGHTED = tuple(float(w) for w in np.linspace(0.5, 2.0, 16))
CONFIGS = {
    "identity": CodecConfig("identity"),
    "patch4": CodecConfig("patch"),
    "patch8": CodecConfig("patch", patch=8, scale=1.7, shift=-0.2),
    "weighted": CodecConfig("patch", patch=4, frequency_scale=WEIGHTED),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(0), (2, 16, 24, 3), minval=-1, maxval=1)


def test_decode_is_the_exact_inverse_of_encode(config, images):
    codec = build_codec(config)
    latents = codec.encode(images)
    assert latents.shape == (2, *codec.latent_shape((16, 24)))
    np.testing.assert_allclose(codec.decode(latents), images, atol=1e-6)


def test_clips_are_coded_frame_by_frame(config, images):
    codec = build_codec(config)
    clip = jnp.stack([images, -images, images[:, ::-1]], axis=1)  # [B, F, H, W, 3]
    latents = codec.encode(clip)
    np.testing.assert_allclose(latents[:, 1], codec.encode(-images), atol=1e-6)
    np.testing.assert_allclose(codec.decode(latents), clip, atol=1e-6)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_patch_transform_is_a_rotation(images, patch):
    codec = build_codec(CodecConfig("patch", patch, scale=1.0, shift=0.0))
    latents = codec.encode(images)
    energy, expected = (jnp.sum(jnp.square(a), axis=(1, 2, 3)) for a in (latents, images))
    np.testing.assert_allclose(energy, expected, rtol=1e-6)
    other = codec.encode(images[:, ::-1])
    np.testing.assert_allclose(jnp.vdot(latents, other), jnp.vdot(images, images[:, ::-1]), rtol=1e-4)


def test_channels_are_the_cosine_transform_of_each_patch_and_colour_in_the_documented_order(images):
    latents = np.asarray(build_codec(CodecConfig("patch", 4, scale=1.0, shift=0.0)).encode(images))
    for row, column, colour in [(0, 0, 0), (3, 5, 2), (1, 4, 1)]:
        patch = np.asarray(images)[1, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4, colour]
        expected = fft.dctn(patch, norm="ortho")
        np.testing.assert_allclose(latents[1, row, column].reshape(4, 4, 3)[..., colour], expected, atol=1e-6)


def decode_with_numpy(description: dict, latents: np.ndarray) -> np.ndarray:
    """A client: reads the description and nothing else."""
    latents = latents / description["scale"]
    if description["kind"] == "identity":
        return latents + description["shift"]
    p = description["patch"]
    k, n = np.mgrid[:p, :p]
    d = np.sqrt((1 + (k > 0)) / p) * np.cos(np.pi * (n + 0.5) * k / p)
    b, h, w, _ = latents.shape
    f = latents.reshape(b, h, w, p, p, 3) / np.reshape(description["frequency_scale"], (p, p, 1))
    pixels = np.einsum("ky,lx,bhwklc->bhywxc", d, d, f)
    return pixels.reshape(b, h * p, w * p, 3) + description["shift"]


def test_a_client_decodes_from_the_json_description_with_numpy_alone(config, images):
    codec = build_codec(config)
    description = json.loads(json.dumps(codec.describe()))
    decoded = decode_with_numpy(description, np.asarray(codec.encode(images)))
    np.testing.assert_allclose(decoded, images, atol=1e-6)


def test_nothing_in_a_codec_has_a_rank_above_four_which_phones_refuse(config, images):
    codec = build_codec(config)
    latents = codec.encode(images)
    for function, argument in ((codec.encode, images), (codec.decode, latents)):
        equations = jax.make_jaxpr(function)(argument).jaxpr.eqns
        assert equations and max(v.aval.ndim for e in equations for v in e.outvars) <= 4


def test_frequency_scale_multiplies_each_frequency_of_every_colour(images):
    plain, weighted = (build_codec(CONFIGS[name]).encode(images) for name in ("patch4", "weighted"))
    np.testing.assert_allclose(weighted, plain * np.repeat(WEIGHTED, 3), atol=1e-5)


def test_latents_of_the_rendered_shapes_have_about_unit_variance_by_default():
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in range(200)]
    images = from_uint8(jnp.stack([render(scene, 32) for scene in scenes]))
    for kind in ("identity", "patch"):
        latents = build_codec(CodecConfig(kind)).encode(images)
        assert float(jnp.mean(jnp.square(latents))) == pytest.approx(1, abs=0.15)


def test_an_image_that_does_not_divide_into_patches_is_refused_with_both_sizes():
    codec = build_codec(CodecConfig("patch", 4))
    assert codec.latent_shape(32) == (8, 8, 48)
    with pytest.raises(ValueError, match="30 x 32 px does not divide into patches of 4"):
        codec.encode(jnp.zeros((1, 30, 32, 3)))


def test_a_config_that_describes_no_codec_is_refused():
    with pytest.raises(ValueError, match="'wavelet'"):
        build_codec(CodecConfig("wavelet"))
    with pytest.raises(ValueError, match="3 entries; a patch of 4 has 16"):
        build_codec(CodecConfig("patch", 4, frequency_scale=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize("decoder", ["autoencoder", "tiny"])
def test_the_networks_of_a_codec_stand_where_its_parameters_do(decoder):
    codec = build_codec(CodecConfig("autoencoder", decoder=decoder))
    networks = codec.networks()
    assert set(networks) == ({""} if decoder == "autoencoder" else {"decoder", "encoder"})
    for name, network in networks.items():
        part = codec.spec()[name] if name else codec.spec()
        assert flatten(part).keys() == set(network.paths)


def test_a_codec_without_parameters_has_no_networks_and_a_decoder_alone_has_one(config):
    codec = build_codec(config)
    assert codec.networks() == {} and codec.spec() == {}
    decoder, _ = build(TinyDecoderConfig.preset("smoke"))
    assert TinyDecoderCodec(decoder).networks() == {"decoder": decoder}


def test_every_grey_level_survives_the_way_to_float_and_back_and_overshoot_is_clipped():
    levels = jnp.arange(256, dtype=jnp.uint8)
    as_float = from_uint8(levels)
    assert as_float[0] == -1 and as_float[-1] == 1
    np.testing.assert_array_equal(to_uint8(as_float), levels)
    np.testing.assert_array_equal(to_uint8(as_float + 0.4 / 127.5), levels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-1.3, 1.3])), [0, 255])
