"""Images and captions through published encoders, frozen, read onto the mesh and run inside the step."""

import dataclasses
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
from snapgen_jax.generation import load
from snapgen_jax.inputs.encoders import EncodersConfig
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.weights.maps import clip, gemma2, sd3_autoencoder
from snapgen_jax.workdir import prepare_workdir
from tests.recipes_for_tests import ONE_STAGE
from tests.tiny_tokenizers import write_clip, write_gemma

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"  # tiny checkpoints, written by the reference libraries


def published(name, maps):
    return maps.read_config(json.loads((GOLDENS / name / "config.json").read_text()))


CONFIG = FlowMatchingConfig(
    batch_size=8,
    train_steps=20,
    network=UNetConfig.preset("smoke", context_width=48, pooled_width=40, **ONE_STAGE),
    inputs=EncodersConfig(
        image_sizes=((16, 24),),
        clip_l=published("clip_l", clip),
        clip_g=published("clip_g", clip),
        language=published("gemma2", gemma2),
        clip_l_folder=str(GOLDENS / "clip_l"),
        clip_g_folder=str(GOLDENS / "clip_g"),
        language_folder=str(GOLDENS / "gemma2"),
        language_tokens=7,
        conditioner=ConditionerConfig(width=48, language_width=20),
        codec=CodecConfig(
            kind="autoencoder",
            autoencoder=published("autoencoder", sd3_autoencoder),
            workdir=str(GOLDENS / "autoencoder"),
        ),
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
)


def recipe(network=CONFIG.network, **changes):
    """The recipe on such inputs."""
    inputs = dataclasses.replace(CONFIG.inputs, **changes)
    return FlowMatching(dataclasses.replace(CONFIG, network=network, inputs=inputs), "cpu")


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = {name: rng.integers(0, 40, (8, n)).astype(np.int32) for name, n in zip(ENCODERS, (12, 12, 7), strict=True)}
    mask = np.ones((8, 7), np.float32)
    mask[:, 5:] = 0
    return {"image": rng.integers(0, 256, (8, 16, 24, 3)).astype(np.uint8), **tokens, "language_mask": mask}


@pytest.fixture(scope="module")
def frozen():
    return recipe().load_frozen(None)


@pytest.fixture(scope="module")
def fresh():
    made = recipe()
    state = jax.jit(made.init)(key(0, 0, "init"))

    def stirred(x):  # layers that begin at zero would hide what lies before them
        return x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    return made.warm_start(state, {"model": jax.tree.map(stirred, state.players["model"].params)})


def test_it_fulfils_the_protocol():
    made = recipe()
    assert isinstance(made, Recipe) and isinstance(made.inputs, Inputs)


def test_the_published_encoders_are_read_split_onto_the_mesh(frozen):
    made, mesh = recipe(), make_mesh(MeshConfig(data=2, fsdp=4))
    split = made.load_frozen(mesh)
    assert fingerprint(split) == fingerprint(frozen)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), made.frozen_spec()) == jax.tree.map(
        lambda x: (x.shape, x.dtype), split
    )
    kernels = {path: leaf for path, leaf in flatten(split["language"]).items() if path[-1] == "kernel"}
    assert kernels
    assert all(leaf.sharding.shard_shape(leaf.shape)[-1] * 4 == leaf.shape[-1] for leaf in kernels.values())


def test_an_update_moves_unet_and_conditioner_and_no_encoder(frozen, fresh):
    made = recipe()
    state, metrics = jax.jit(made.update)(fresh, frozen, batch(), key(0, 0, "update"))
    assert np.isfinite(metrics["loss"])
    before, after = (flatten(s.players["model"].params) for s in (fresh, state))
    assert {path[0] for path in after} == {"unet", "conditioner"}
    still = ["/".join(path) for path, leaf in after.items() if np.array_equal(leaf, before[path])]
    assert not still


def test_each_encoder_is_left_out_on_its_own_and_what_is_left_out_says_nothing(frozen, fresh):
    made = recipe(encoder_dropout=0.5)
    networks = made.current(fresh, frozen)
    drawn = jax.jit(made.draw)(networks, batch(), jax.random.key(3))
    kept = np.stack([drawn["kept"][name] for name in ENCODERS])
    assert len(np.unique(kept, axis=1).T) > 3  # of eight examples, as many combinations
    context = jax.jit(made.inputs.condition)(networks, drawn["condition"])
    clips = np.maximum(kept[0], kept[1])
    masks = [clips[:, None].repeat(12, axis=1), kept[2][:, None] * batch()["language_mask"]]
    np.testing.assert_array_equal(context.mask, np.concatenate(masks, axis=1))
    assert not np.asarray(context.sequence)[:, 12:][kept[2] == 0].any()
    assert not np.asarray(context.pooled)[:, :20][kept[0] == 0].any()
    assert np.asarray(context.pooled)[:, :20][kept[0] == 1].any(axis=1).all()


def test_the_null_condition_is_that_of_a_caption_from_which_all_encoders_are_left_out(frozen, fresh):
    made = recipe()
    networks, inputs = made.current(fresh, frozen), made.inputs
    nothing = {name: jnp.zeros(8) for name in ENCODERS}
    told = jax.jit(inputs.draw_condition)(networks, batch(), jax.random.key(0), nothing)
    context, null = jax.jit(inputs.condition)(networks, told), inputs.null_condition(networks)
    for given, expected in zip(jax.tree.leaves(context), jax.tree.leaves(null), strict=True):
        assert expected.shape == (1, *given.shape[1:]) and expected.dtype == given.dtype
        np.testing.assert_array_equal(given, np.broadcast_to(expected, given.shape))


def test_all_encoders_are_kept_where_nothing_is_said_and_where_another_inputs_keeps_the_text(frozen, fresh):
    made = recipe(encoder_dropout=1.0)
    networks, inputs = made.current(fresh, frozen), made.inputs
    read = jax.jit(inputs.draw_condition)
    everything = read(networks, batch(), jax.random.key(0), {})
    assert set(everything) == set(ENCODERS)
    text = jnp.arange(8) % 2 == 0
    kept = read(networks, batch(), jax.random.key(0), {"text": text})["kept"]
    assert set(kept) == set(ENCODERS)
    for rows in kept.values():
        np.testing.assert_array_equal(rows, text)


def test_it_draws_images_that_every_encoder_has_a_say_in(frozen, fresh):
    made, weights = recipe(), {"model": fresh.players["model"].params}
    keys = example_keys(0, jnp.arange(2))
    options = dataclasses.replace(made.options, steps=2, guidance=2.0)
    draw = jax.jit(lambda given: made.generate(weights, frozen, given, keys, options))
    given = {name: array[:2] for name, array in batch().items() if name != "image"}
    first = draw(given)
    assert first["image"].shape == (2, 16, 24, 3) and first["latent"].shape == (2, 4, 6, 4)
    for name in ENCODERS:
        other = draw({**given, name: (given[name] + 1) % 40})
        assert not np.allclose(other["latent"], first["latent"], atol=1e-5), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"conditioner": ConditionerConfig(width=40, language_width=20)}, "conditioner.width is 40"),
        ({"network": UNetConfig.preset("smoke", context_width=48)}, "network.pooled_width is 16"),
        ({"network": UNetConfig.preset("smoke", pooled_width=40)}, "network.context_width is 16"),
        ({"codec": CodecConfig()}, "codec.kind is 'patch'"),
        ({"image_sizes": ((16, 18),)}, "18"),
        (
            {"codec": CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("shapes"))},
            "the inputs give 8 latent channels",
        ),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        recipe(**changes)


def test_missing_weights_are_asked_for_with_their_source():
    made = recipe(language_folder="")
    with pytest.raises(ConfigError, match=r"gemma2_2b has no weights: set its folder(.|\n)*google/gemma-2-2b"):
        made.load_frozen(None)


def test_stand_ins_have_the_shapes_of_what_they_stand_for():
    made = recipe(stand_ins=True)
    drawn = jax.eval_shape(lambda: made.load_frozen(None))
    spec = made.frozen_spec()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)


def captioned(tmp_path, *overrides):
    """The config of a laptop's run on rendered scenes, with tokenizers of the published kinds."""
    folders = {
        "clip_l": write_clip(tmp_path / "tokenizer"),
        "clip_g": write_clip(tmp_path / "tokenizer_2", pad_token="!"),
        "language": write_gemma(tmp_path / "gemma"),
    }
    return load_experiment(
        "configs/pretrain/t2i_256_images.py:runlocal",
        [
            "train_steps=2",
            "evaluation.final=()",
            "inputs.image_sizes=((16,16),)",
            "data.source=shapes",
            "data.shapes.size=32",
            *(f"inputs.{name}_tokenizer={folder}" for name, folder in folders.items()),
            *(f"inputs.{name}.vocab_size=400" for name in folders),
            *overrides,
        ],
    )


def test_it_trains_on_captions_and_draws_from_prompts_with_the_tokenizer_of_each_encoder(tmp_path):
    resolved = captioned(tmp_path)
    prepare_workdir(resolved.config, tmp_path / "run")
    experiment = Experiment(resolved, tmp_path / "run")
    arrays = next(experiment.data.batches(0)).arrays
    specs = experiment.recipe.batch_specs()["16x16"]
    assert {name: array.shape for name, array in arrays.items()} == {name: spec.shape for name, spec in specs.items()}
    begin, end = (
        PretrainedTokenizer.load(tmp_path / "tokenizer")._model.convert_tokens_to_ids(f"<|{word}oftext|>")
        for word in ("start", "end")
    )
    assert (arrays["clip_l"][:, 0] == begin).all() and (arrays["clip_l"] == end).any(axis=1).all()
    padding = PretrainedTokenizer.load(tmp_path / "gemma").pad_id
    np.testing.assert_array_equal(arrays["language_mask"], arrays["language"] != padding)
    experiment.train()
    images = load(tmp_path / "run").generate(["a red circle", "a ring above a cross"], steps=1)
    assert images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("inputs.clip_g_tokenizer=", "text encoder clip_g has no tokenizer: set inputs.clip_g_tokenizer"),
        ("inputs.language.vocab_size=64", "the text encoder language takes 64"),
    ],
)
def test_a_tokenizer_that_is_missing_or_of_another_encoder_is_refused(tmp_path, override, says):
    with pytest.raises(DataError, match=says):
        _ = Experiment(captioned(tmp_path, override), tmp_path / "run").tokenizer


@pytest.mark.parametrize("source", ["folder", "tfds"])
def test_the_published_run_names_weights_and_tokenizers_but_gemmas_which_lie_elsewhere(source):
    inputs = load_experiment(f"configs/pretrain/t2i_256_images.py:{source}").recipe.inputs
    folders = dataclasses.asdict(inputs)
    empty = {name for name, value in folders.items() if name.endswith(("_folder", "_tokenizer")) and not value}
    assert empty == {"language_folder", "language_tokenizer"} and inputs.codec.workdir == "sd35/vae"
