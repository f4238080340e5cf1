"""The client's numpy arithmetic is that of the library: same times, features, steps, codec and token ids."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.data.tokenizer import Tokenizer
from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.diffusion.path import T_MIN, velocity_from_x0
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.timesteps import time_grid
from snapgen_jax.export import client, sampler
from snapgen_jax.export import program as programs
from snapgen_jax.export.apps import copy_bundle
from snapgen_jax.export.bench import Asked, bench
from snapgen_jax.export.client import Bundle, LiteRTGenerator
from snapgen_jax.export.program import BundleError, parse
from snapgen_jax.export.verify import grey_levels
from snapgen_jax.generation import Generator, load_config
from snapgen_jax.networks.codec import CodecConfig, build_codec, to_uint8
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.training.exits import ConfigError

from .conftest import FRAME, PROMPTS, ToyRecipe

FRAMED = programs.Tokenizer(tokens="tokens", mask="mask", **FRAME), ToyRecipe.LENGTH


def program(step=None, **changes):
    """The toy's program, changed."""
    plain = ToyRecipe().exports().program
    return {**plain, **changes, "step": {**plain["step"], **(step or {})}}


def test_time_features_are_those_of_the_library():
    t = np.linspace(0, 1, 13, dtype=np.float32)
    spec = {"dim": 256, "scale": 1000.0, "max_period": 10_000.0, "order": "cos,sin"}
    # A last-bit difference of the frequency 1 / 1 turns the angle 1000 by 6e-5.
    np.testing.assert_allclose(sampler.time_features(t, spec), time_features(jnp.asarray(t), 256), atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_another_number_of_steps_has_the_librarys_grid(shift):
    flow = parse(program(shift=shift, times=time_grid(3, shift).tolist()))
    np.testing.assert_array_equal(flow.times, time_grid(3, shift))
    np.testing.assert_array_equal(sampler.with_options(flow, steps=7).times, time_grid(7, shift))


@pytest.mark.parametrize("t", [0.0, 0.01, 0.5, 1.0])
def test_a_predicted_image_gives_the_velocity_of_the_library(t):
    x, out = np.random.default_rng(0).standard_normal((2, 1, 5)).astype(np.float32)
    made = sampler.as_velocity(out, x, np.float32(t), {"kind": "x_0", "t_min": T_MIN})
    np.testing.assert_allclose(made, velocity_from_x0(x, out, t), rtol=1e-6)
    assert sampler.as_velocity(out, x, np.float32(t), {"kind": "velocity"}) is out


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_steps_are_those_of_the_library(method):
    x = np.random.default_rng(0).standard_normal((1, 5)).astype(np.float32)
    times = time_grid(6, 2.0)
    expected, _ = sample(lambda x, t, i, c: (jnp.sin(3 * x) + t[:, None], c), jnp.asarray(x), times, method=method)
    for t, s in itertools.pairwise(times):
        x = sampler.advance(lambda x, t, end: np.sin(3 * x) + t, x, t, s, method)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_jumps_are_those_of_the_library_with_one_call_a_step():
    times = time_grid(4, 3.0)
    noise = np.random.default_rng(0).standard_normal((4, 1, 2, 5)).astype(np.float32)
    later = jnp.asarray(np.roll(noise, -1, axis=0))
    expected, _ = sample(lambda x, t, i, c: (jnp.sin(3 * x), c), noise[0], times, method="renoise", noise=later)
    calls = []

    def unit(**arrays):
        calls.append(arrays["time"])
        return {"prediction": np.sin(3 * arrays["latent"])}

    step = {"rule": "renoise", "guidance": 1.0, "context": None}
    outputs = {"latent": {"shape": [1, 2, 5], "dtype": "float32"}}
    few = program(step, times=times.tolist(), latent_shape=[1, 2, 5], decoder=None, outputs=outputs)
    name = few["step"]["unit"]
    few = sampler.Sampler(parse(few), {name: unit}, {name: {"latent": (1, 1, 2, 5), "time": (1, 16)}})
    latents = few.trajectory(noise, {None: {}}, {})
    assert len(calls) == 4
    np.testing.assert_allclose(latents[-1], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"take \(4, 1, 2, 5\)"):
        few.trajectory(noise[0], {None: {}}, {})


@pytest.mark.parametrize(
    "config",
    [
        CodecConfig(kind="identity", scale=2.0, shift=-0.2),
        CodecConfig(patch=4, scale=1.7, shift=0.3),
        CodecConfig(patch=2, frequency_scale=(1.0, 2.0, 3.0, 4.0)),
    ],
)
def test_codecs_decode_as_the_library_does(config):
    codec = build_codec(config)
    images = jax.random.uniform(jax.random.key(0), (8, 12, 3), minval=-1, maxval=1)
    latents = codec.encode(images)
    np.testing.assert_array_equal(
        sampler.decode(np.asarray(latents), codec.describe()), to_uint8(codec.decode(latents))
    )


def test_prompts_get_the_ids_of_training(tokenizer_json):
    prompts = [*PROMPTS, "", "Two GREEN stars", "a red circle " * 20, "naïve ★ 星"]
    tokens, mask = client.tokenize(tokenizer_json, prompts, *FRAMED)
    expected_tokens, expected_mask = Tokenizer.load(tokenizer_json).encode(prompts, FRAMED[1])
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_array_equal(mask, expected_mask)


def test_half_a_character_is_named(tokenizer_json):
    with pytest.raises(ValueError, match=r"the prompt 'a \\udcff star' is no text: it was not UTF-8"):
        client.tokenize(tokenizer_json, ["a star", "a \udcff star"], *FRAMED)


def test_an_image_depends_on_its_seed_index_and_prompt_alone(toy):
    generator = LiteRTGenerator(toy.folder)
    images = generator.generate(PROMPTS, seed=3)
    assert images.shape == (2, 4, 4, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(generator.generate(PROMPTS[1:], seed=3, indices=[1]), images[1:])
    assert (generator.generate(PROMPTS[1:], seed=3) != images[1:]).any()
    assert (generator.generate(PROMPTS, seed=4) != images).any()


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "renoise"}, {"guidance_interval": (0.3, 0.9), "guidance": 4.0}],
    ids=["euler", "renoise", "interval"],
)
def test_a_bundle_draws_the_picture_of_its_run_from_the_same_seed_index_and_prompt(smoke, tokenizer_json, options):
    run = Generator(smoke.recipe, smoke.params, {}, Tokenizer.load(tokenizer_json))
    bundle = LiteRTGenerator(smoke.folder)
    images = []
    for seed in (0, 2**32 - 1):
        chosen = {"seed": seed, "indices": [3, 2**32 - 1], **options}
        images += [*bundle.generate(PROMPTS, **chosen)]
        differences = grey_levels(np.stack(images[-2:]), run.generate(PROMPTS, **chosen))
        assert differences.max() <= 1 and (differences > 0).mean() <= 1e-3
    for one, other in itertools.combinations(images, 2):
        assert grey_levels(one, other).mean() > 3, "another seed or index gives another picture"


def test_golden_noise_is_that_of_its_seed(toy, clip):
    for exported in (toy, clip):
        seed = json.loads((exported.folder / "golden" / "golden.json").read_text())["seed"]
        for index, noise in enumerate(np.load(exported.folder / "golden" / "noise.npy")):
            np.testing.assert_array_equal(noise, draw_noise(seed, index, noise.shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "the seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "the seed is 4294967296; it must"),
        ({"indices": [0, -1]}, "the index is -1; it must"),
    ],
)
def test_a_seed_or_an_index_out_of_bounds_is_named(toy, options, message):
    with pytest.raises(ValueError, match=message):
        LiteRTGenerator(toy.folder).generate(PROMPTS, **options)


def test_options_replace_the_bundles_own(toy):
    generator = LiteRTGenerator(toy.folder, precision="f16")
    default = generator.generate(PROMPTS[:1])
    np.testing.assert_array_equal(generator.generate(PROMPTS[:1], steps=3, guidance=2.0, method="euler"), default)
    for options in ({"steps": 9}, {"guidance": 1.0}, {"method": "heun"}, {"guidance_interval": (0.3, 0.9)}):
        assert (generator.generate(PROMPTS[:1], **options) != default).any(), options
    with pytest.raises(ValueError, match="unknown sampling method 'ddim'; expected one of euler, heun"):
        generator.generate(PROMPTS[:1], method="ddim")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "golden/../../secret", "golden/../manifest.json", "..\\secret", "c:secret"]
)
def test_no_file_name_leaves_the_bundle(toy, name):
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle(toy.folder).file(name)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"holds no manifest\.json"):
        Bundle(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1')
    with pytest.raises(BundleError, match=r"manifest\.json is not readable JSON"):
        Bundle(tmp_path)


def test_a_run_in_place_of_its_bundle_is_told_where_the_bundle_lies(toy, tmp_path):
    shutil.copytree(toy.folder, tmp_path / "run" / "export" / "bundle")
    with pytest.raises(BundleError, match=r"is not an export bundle; its bundle is .*/run/export/bundle"):
        Bundle(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"it is a bundle: name it by --bundle="):
        load_config(tmp_path / "run" / "export" / "bundle")


def test_a_network_that_was_cut_short_is_named(toy, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(toy.folder, folder)
    (folder / "net_f32.tflite").write_bytes((folder / "net_f32.tflite").read_bytes()[:1000])
    message = r"'net_f32\.tflite' is damaged: it has 1,000 bytes, and manifest\.json says"
    with pytest.raises(BundleError, match=message):
        LiteRTGenerator(folder)
    with pytest.raises(BundleError, match=message):
        bench(folder, Asked(rounds=1))
    with pytest.raises(ConfigError, match=r"the file 'net_f32\.tflite' of the bundle .* is damaged"):
        copy_bundle(folder, tmp_path / "app")


def test_an_unknown_precision_is_refused(toy):
    with pytest.raises(BundleError, match="no precision 'mixed' in this bundle; it has f32, f16, int8"):
        LiteRTGenerator(toy.folder, precision="mixed")
