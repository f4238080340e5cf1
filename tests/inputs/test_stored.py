"""Stored latents and text states: what a batch of them is, and that flow matching pretrains on them in stages."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import inference_weights, load, train
from snapgen_jax.config import load_experiment
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load_recipe, load_weights
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.inputs.stored import CONTEXT, StoredConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.workdir import prepare_workdir
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
STAGES = pathlib.Path("configs/pretrain")


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


def test_it_has_no_codec_and_no_bundle_and_says_what_to_do():
    with pytest.raises(ConfigError, match="name the autoencoder that made them"):
        stored().codec({})
    with pytest.raises(ConfigError, match="export a run whose inputs are 'captions'"):
        stored().exports()


# --- stages ----------------------------------------------------------------------------------------------------------


def stage(size, workdir, *overrides):
    spec = f"{STAGES}/t2i_{size}.py:runlocal"
    resolved = load_experiment(spec, ["train_steps=6", "log_every_steps=2", "tensorboard=False", *overrides])
    prepare_workdir(resolved.config, workdir)
    return Experiment(resolved, workdir)


def first_loss(workdir):
    return json.loads((workdir / "metrics" / "train.jsonl").read_text().splitlines()[0])["loss"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """256 -> 512 px of the pretraining in small: latents of 8 x 8, then of 16 x 16."""
    root = tmp_path_factory.mktemp("stages")
    fast = ["optimizer.learning_rate=0.01", "optimizer.warmup_steps=1", "ema_decay=0.5"]
    stage(256, root / "first", *fast).train()
    second = stage(512, root / "second", f"init_from={root / 'first'}", "inputs.image_sizes=((128,128),)")
    return root, second, second.train()


def test_the_first_loss_of_a_stage_is_that_of_the_averaged_weights_of_the_one_before(stages):
    root, second, _ = stages
    weights = load_weights(root / "first", load_recipe(root / "first"))["model"]
    made = second.recipe
    arrays = next(second.data.batches(0)).arrays
    assert arrays["latent"].shape == (8, 16, 16, 16)
    drawn = made.draw({}, arrays, key(second.config.seed, 0, "update"), 0)

    def loss(params):
        return float(jax.jit(made.loss)(made.weights({"model": params}, {}), drawn, {})[0])

    assert first_loss(root / "second") == pytest.approx(loss(weights), rel=1e-5)
    fresh = made.init(key(second.config.seed, 0, "init")).players["model"].params
    assert first_loss(root / "second") != pytest.approx(loss(fresh), rel=1e-3)


def test_what_a_stage_changes_and_what_begins_anew(stages):
    root, second, state = stages
    first = load_recipe(root / "first")
    assert (first.config.schedule.shift, second.recipe.config.schedule.shift) == (1.0, 1.7)
    assert int(state.step) == 6
    counts = [leaf for leaf in jax.tree.leaves(state.players["model"].opt_state) if leaf.dtype == jnp.int32]
    assert [int(count) for count in counts] == [6] * len(counts), "the schedule and the moments began at 0"


def test_a_resumed_stage_goes_on_from_itself(stages, tmp_path):
    root, _, state = stages
    straight = flatten(state.players["model"].params)
    half = stage(
        512, tmp_path, f"init_from={root / 'first'}", "inputs.image_sizes=((128,128),)", "checkpoint.every_steps=3"
    )
    half.config = dataclasses.replace(half.config, train_steps=3)
    half.train()
    # The stage before is gone: it is not read again.
    again = stage(
        512, tmp_path, f"init_from={tmp_path / 'gone'}", "inputs.image_sizes=((128,128),)", "checkpoint.every_steps=3"
    )
    for name, leaf in flatten(again.train().players["model"].params).items():
        np.testing.assert_array_equal(leaf, straight[name])


def test_prompts_are_refused_by_a_run_without_a_text_encoder(stages):
    with pytest.raises(ConfigError, match="holds no text encoder"):
        load(stages[0] / "first").generate(["a red fox"])
