"""Captions through the published CLIP-L, frozen in the step, beside images or stored latents."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from snapgen_jax.experiment import Experiment
from snapgen_jax.export.program import parse
from snapgen_jax.export.sampler import Sampler
from snapgen_jax.generation import Generator
from snapgen_jax.inputs.clip_captions import ClipCaptionsConfig, ClipFrozenConfig
from snapgen_jax.inputs.stored_clip_captions import StoredClipCaptionsConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.weights.maps import clip, sd3_autoencoder
from tests.recipes_for_tests import ONE_STAGE
from tests.tiny_tokenizers import write_clip

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def published(name, maps):
    return maps.read_config(json.loads((GOLDENS / name / "config.json").read_text()))


TEXT = published("clip_l", clip)
INPUTS = ClipCaptionsConfig(
    image_sizes=((16, 24),),
    codec=CodecConfig(
        kind="autoencoder",
        autoencoder=published("autoencoder_sd1", sd3_autoencoder),
        workdir=str(GOLDENS / "autoencoder_sd1"),
    ),
    clip_l=TEXT,
    clip_l_folder=str(GOLDENS / "clip_l"),
    clip_l_tokenizer="clip",
    caption_dropout=0.5,
)
FROZEN = ClipFrozenConfig(INPUTS.codec, INPUTS.clip_l, INPUTS.clip_l_folder, INPUTS.clip_l_tokenizer)
STORED = StoredClipCaptionsConfig(
    image_sizes=INPUTS.image_sizes, reduction=4, dtype="float32", encoders=FROZEN, caption_dropout=0.5
)
WIDTHS = {"context_width": TEXT.width, "pooled_width": TEXT.projection}


def recipe(**changes):
    network = UNetConfig.preset("smoke", **WIDTHS, **ONE_STAGE)
    inputs = dataclasses.replace(INPUTS, **changes)
    return FlowMatching(FlowMatchingConfig(batch_size=8, train_steps=20, network=network, inputs=inputs), "cpu")


def stored_recipe():
    return FlowMatching(dataclasses.replace(recipe().config, inputs=STORED), "cpu")


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (8, TEXT.max_tokens)).astype(np.int32)
    return {"image": rng.integers(0, 256, (8, 16, 24, 3)).astype(np.uint8), "clip_l": tokens}


@pytest.fixture(scope="module")
def frozen():
    return recipe().load_frozen(None)


def test_text_encoder_and_autoencoder_are_read_split_onto_the_mesh(frozen):
    split = recipe().load_frozen(make_mesh(MeshConfig(data=2, fsdp=4)))
    assert set(split) == {"clip_l", "codec"} and fingerprint(split) == fingerprint(frozen)
    assert recipe().inputs.pretrained() == ("clip_l", "codec")


def test_a_dropped_caption_is_the_null_condition_and_the_others_are_what_clip_makes_of_them(frozen):
    inputs, kept = recipe().inputs, np.arange(8) % 2 == 0
    told = jax.jit(inputs.draw_condition)(frozen, batch(), jax.random.key(0), {"clip_l": kept})
    whole = jax.jit(inputs.draw_condition)(frozen, batch(), jax.random.key(0), {})
    null = inputs.null_condition(frozen)
    for given, everything, nothing in zip(*map(jax.tree.leaves, (told, whole, null)), strict=True):
        assert given.dtype == nothing.dtype and nothing.shape == (1, *given.shape[1:])
        np.testing.assert_array_equal(given[kept], everything[kept])
        np.testing.assert_array_equal(given[~kept], np.broadcast_to(nothing, given.shape)[~kept])
    assert np.all(whole.mask) and not np.any(null.mask) and np.ptp(whole.pooled, axis=0).min() > 0


def test_an_update_on_what_is_stored_is_that_on_images_and_captions_and_moves_the_unet_alone(frozen):
    within, beforehand = recipe(), stored_recipe()
    makers = beforehand.inputs.frozen_encoders()
    assert set(makers.networks()) == {"codec"} and makers.describe()["latent"]["scale"] == 0.18215
    stored = {**makers.encode_images(frozen, batch()["image"]), **makers.encode_text(frozen, batch())}
    specs = beforehand.batch_specs()["16x24"]
    assert {name: (x.shape, x.dtype) for name, x in specs.items()} == {
        name: (x.shape, x.dtype) for name, x in stored.items()
    }
    held = beforehand.load_frozen(None)
    assert set(held) == {"clip_l"}
    state = jax.jit(within.init)(key(0, 0, "init"))
    both = [
        jax.jit(made.update)(state, given, arrays, key(0, 0, "update"))
        for made, given, arrays in ((within, frozen, batch()), (beforehand, held, stored))
    ]
    assert float(both[0][1]["loss"]) == pytest.approx(float(both[1][1]["loss"]), rel=1e-6)
    first, second = (flatten(state.players["model"].params) for state, _ in both)
    assert {path[0] for path in first} == {"unet"}
    for path, leaf in first.items():
        np.testing.assert_allclose(leaf, second[path], rtol=1e-6, atol=1e-6)


def test_a_run_on_what_is_stored_is_drawn_from_through_both_encoders_where_they_are_named():
    assert STORED.unstored() == INPUTS
    nameless = dataclasses.replace(STORED, encoders=ClipFrozenConfig())
    assert nameless.unstored() is None
    with pytest.raises(ConfigError, match=r"a bundle needs the text encoder and the decoder"):
        stored_recipe().exports()


def test_encoders_that_make_other_latents_than_are_described_are_refused():
    with pytest.raises(ConfigError, match=r"inputs.reduction is 8, and the networks of inputs.encoders make 4"):
        dataclasses.replace(STORED, reduction=8).build(8, "cpu").frozen_encoders()


@pytest.mark.parametrize("null", ["zeros", "empty_prompt"])
def test_a_bundle_draws_from_clip_what_the_run_draws_within_its_band_of_times(frozen, null):
    made = recipe(null=null)
    params = {"model": jax.jit(made.first_params)(key(0, 0, "init"))}
    stirred = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    options = dataclasses.replace(made.options, steps=4, guidance=3.0, guidance_interval=(0.2, 0.6))
    made.options = options
    plan, told, noise = made.exports(), batch()["clip_l"][:1], np.random.default_rng(1).normal(size=(1, 4, 6, 4))
    noise, weights = noise.astype(np.float32), made.weights(stirred, frozen)
    given = {"clip_l": told, "noise": noise}
    drawn = jax.jit(lambda: made.generate(stirred, frozen, given, example_keys(0, jnp.arange(1)), options))()
    units = {unit.name: functools.partial(jax.jit(unit.function), unit.select(weights)) for unit in plan.units}
    shapes = {unit.name: {name: x.shape for name, x in unit.inputs.items()} for unit in plan.units}
    (entry,) = plan.program["tokenizers"]
    assert entry == {"file": "tokenizers/clip_l.json", "tokens": "clip_l"}  # the exporter reads its frame in that file
    framed = {**plan.program, "tokenizers": [{**entry, "begin": [1], "end": [2], "pad": 0}]}
    sampler = Sampler(parse(framed), units, shapes)
    image = sampler.run({"clip_l": told[0]}, noise[0])["image"]
    assert np.abs(image.astype(int) - np.asarray(drawn["image"][0])).max() <= 1
    other = sampler.run({"clip_l": told[0]}, noise[0], guidance_interval=(0.0, 1.0))["image"]
    assert (image != other).any()


def test_without_a_caption_it_is_zeros_or_the_empty_prompt_and_a_run_of_the_other_is_refused(frozen):
    empty, zeros = recipe(null="empty_prompt").inputs, recipe().inputs
    told = empty.text.encode(frozen, {"clip_l": empty.empty_prompt()[None]})["clip_l"]
    jax.tree.map(np.testing.assert_array_equal, empty.null_condition(frozen), told)
    assert list(empty.empty_prompt()[:3]) == [TEXT.bos_id, TEXT.eos_id, TEXT.pad_id] and np.all(told.mask)
    assert dataclasses.replace(STORED, null="empty_prompt").unstored() == empty.config
    run = {"kind": "clip_captions", "codec": {"kind": "autoencoder"}}
    zeros.check_run("runs/base", run, ("latent", "condition"))
    empty.check_run("runs/base", run, ("latent",))
    for ours in (empty, dataclasses.replace(STORED, null="empty_prompt").build(8, "cpu")):
        with pytest.raises(ConfigError, match=r"'runs/base' was trained with inputs\.null='zeros'"):
            ours.check_run("runs/base", run, ("latent", "condition"))


def test_missing_weights_are_asked_for_with_their_source():
    with pytest.raises(ConfigError, match=r"clip_l has no weights(.|\n)*openai/clip-vit-large-patch14"):
        recipe(clip_l_folder="").load_frozen(None)
    codec = dataclasses.replace(INPUTS.codec, workdir="")
    with pytest.raises(ConfigError, match=r"autoencoder has no weights(.|\n)*stabilityai/sd-vae-ft-mse"):
        recipe(codec=codec).load_frozen(None)


# --- the config of ImageNet with tiny networks of these kinds --------------------------------------------------------


def imagenet(*overrides):
    """`configs/imagenet/256.py` as it is, but for sizes, on scanned digits."""
    small = {"preset": "smoke", "latent_channels": 4, **ONE_STAGE}
    return load_experiment(
        "configs/imagenet/256.py",
        [
            "batch_size=8",
            "data={'source': 'digits'}",
            "inputs.image_sizes=((16,16),)",
            "inputs.stand_ins=True",
            "inputs.codec.autoencoder.preset=smoke",
            "inputs.codec.workdir=",
            "inputs.clip_l.preset=smoke",
            "inputs.clip_l.vocab_size=400",
            *(f"network.{name}={value}" for name, value in small.items()),
            *overrides,
        ],
    )


def test_it_reads_class_names_and_draws_from_them_within_a_band_of_times(tmp_path):
    folder = write_clip(tmp_path / "clip")
    experiment = Experiment(imagenet(f"inputs.clip_l_tokenizer={folder}"), tmp_path / "run")
    recipe = experiment.recipe
    arrays = next(experiment.data.batches(0)).arrays
    begin = PretrainedTokenizer.load(folder)._model.convert_tokens_to_ids("<|startoftext|>")
    assert arrays["clip_l"].shape == (8, 8) and (arrays["clip_l"][:, 0] == begin).all()
    params = {"model": jax.jit(recipe.first_params)(key(0, 0, "init"))}
    generator = Generator(recipe, params, recipe.load_frozen(None), experiment.tokenizer)
    assert generator.takes_prompts and recipe.options.guidance_interval == (0.0, 0.7)
    assert generator.generate(["a photo of a zero"], steps=2).shape == (1, 16, 16, 3)


def test_a_tokenizer_of_another_encoder_is_refused(tmp_path):
    folder = write_clip(tmp_path / "clip")
    resolved = imagenet(f"inputs.clip_l_tokenizer={folder}", "inputs.clip_l.vocab_size=64")
    with pytest.raises(DataError, match="the text encoder clip_l takes 64"):
        _ = Experiment(resolved, tmp_path / "run").tokenizer
