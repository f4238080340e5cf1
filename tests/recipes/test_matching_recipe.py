"""Matching as a recipe: it tells true captions from false ones, and says so of each kind of change."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from snapgen_jax import inference_weights, train
from snapgen_jax.config import load_experiment
from snapgen_jax.evaluation.matching import MatchingAccuracy
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.matching import matching_loss
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.matching import MatchingConfig
from snapgen_jax.recipes.matching import MatchingRecipe, MatchingRecipeConfig, altered
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import GREY_TOKENS, greys

TEXT = ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS, attention="full", embedding_std=1.0)
CONFIG = MatchingRecipeConfig(
    batch_size=16,
    train_steps=400,
    inputs=ImagesConfig(image_sizes=((8, 8),)),
    network=MatchingConfig.preset("smoke", text=TEXT),
    negatives="caption",
    changes=("darker", "brighter"),
    noise=0.02,
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5),
    ema_decay=0.0,
)


def recipe(**changes):
    return MatchingRecipe(dataclasses.replace(CONFIG, **changes), "cpu")


def batch(seed):
    """Greys with their name, and the name of another grey: `changed` says whether it is a brighter one."""
    found = greys(seed, 16)
    grey = found["tokens"][:, 1] - 3
    other = (grey + np.random.default_rng(seed + 1000).integers(1, 8, 16)) % 8
    false = found["tokens"].copy()
    false[:, 1] = 3 + other
    changed = (other > grey).astype(np.int32)
    return {"image": found["image"], "tokens": found["tokens"], "other_tokens": false, "changed": changed}


@pytest.fixture(scope="module")
def trained():
    made = recipe()
    state = train(made, (batch(n) for n in range(1000)), steps=400, quiet=True)
    return made, inference_weights(state)


class Split:
    """A validation split of these batches, every other example of which is unreadable."""

    def __iter__(self):
        for n in range(2000, 2100):
            arrays = batch(n)
            arrays["tokens"][1::2] = 0  # what stands there must not be counted
            yield types.SimpleNamespace(arrays=arrays, valid=np.arange(16) % 2 == 0)


def test_it_learns_what_is_false_and_the_evaluator_says_so_by_what_was_changed(trained):
    made, weights = trained
    assert isinstance(made, Recipe)
    (spec,) = made.evaluators()
    measure = MatchingAccuracy(spec.function, **spec.options, batches=8)
    numbers = measure(types.SimpleNamespace(params=weights, frozen={}), Split()).numbers
    assert numbers["matching.accuracy"] > 0.9 and numbers["matching.loss"] < 0.4
    for name in ("darker", "brighter"):
        assert numbers[f"matching.accuracy.{name}"] > 0.85 and numbers[f"matching.ranked.{name}"] > 0.85
    mean = 0.5 * (numbers["matching.true"] + numbers["matching.false"])
    np.testing.assert_allclose(numbers["matching.accuracy"], mean)


def test_a_run_is_asked_how_well_an_image_fits(trained):
    made, weights = trained
    one = batch(7)
    keys = jax.random.split(jax.random.key(0), 16)
    given = {"image": one["image"], "tokens": one["tokens"]}
    assert set(made.conditions()) == set(given)
    true = made.generate(weights, {}, given, keys, made.options)["match"]
    false = made.generate(weights, {}, {**given, "tokens": one["other_tokens"]}, keys, made.options)["match"]
    assert true.mean() > false.mean() + 0.5


def test_other_captions_of_the_batch_are_false_where_the_data_give_none():
    made = recipe(negatives="batch", changes=())
    one = batch(0)
    specs = made.batch_specs()["8x8"]
    assert set(specs) == {"image", "tokens"} and set(made.tokenizers()) == {"tokens"}
    np.testing.assert_array_equal(made.false(one), np.roll(one["tokens"], 1, axis=0))
    state = jax.jit(made.init)(key(0, 0, "init"))
    _, metrics = jax.jit(make_step(made, 0))(state, {}, {name: one[name] for name in specs})
    assert bool(metrics["finite"]) and 0 <= metrics["accuracy"] <= 1


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    def stepped(microbatches):
        made = recipe(microbatches=microbatches)
        state = jax.jit(made.init)(key(0, 0, "init"))
        return jax.jit(make_step(made, 0))(state, {}, batch(0))[1]

    np.testing.assert_allclose(stepped(1)["grad_norm"], stepped(4)["grad_norm"], rtol=1e-4)


def test_the_loss_is_the_mean_cross_entropy_of_both_captions():
    true, false = np.array([2.0, -1.0, 30.0]), np.array([0.5, -3.0, -30.0])
    p, q = 1 / (1 + np.exp(-true)), 1 / (1 + np.exp(-false))
    expected = -0.5 * (np.log(p) + np.log1p(-q))
    np.testing.assert_allclose(matching_loss(jnp.asarray(true), jnp.asarray(false)), expected, rtol=1e-5, atol=1e-7)


def test_images_are_altered_each_by_an_amount_of_its_own():
    images = jnp.zeros((4, 16, 16, 3)).at[:, :, 8:].set(1.0)
    np.testing.assert_array_equal(altered(images, jax.random.key(0), 0.0, 0.0), images)
    blurred = altered(images, jax.random.key(0), 0.0, 2.0)
    np.testing.assert_allclose(blurred.sum((1, 2)), images.sum((1, 2)), rtol=1e-5)  # light is kept
    edges = [float(image) for image in blurred[:, 5, 7, 0]]
    assert len(set(edges)) == 4 and 0 < min(edges) < 0.5
    np.testing.assert_array_equal(blurred[:, 4, :4], images[:, 4, :4])  # beyond the reach
    noisy = altered(0.5 * jnp.ones_like(images), jax.random.key(0), 0.1, 0.0)
    spread = noisy.std(axis=(1, 2, 3))
    assert len(set(spread.tolist())) == 4 and spread.max() < 0.12 and noisy.min() >= 0


def test_the_tokenizer_is_a_generators_or_trained_on_true_captions_alone(tmp_path):
    named = recipe(tokenizer_workdir="runs/base").tokenizers()
    assert named["tokens"] == TokenizerSpec("trained", GREY_TOKENS, TEXT.vocab_size, "runs/base")
    assert named["other_tokens"] == dataclasses.replace(named["tokens"], like="tokens")
    files = []
    for name, config in (("reward", "matching"), ("generator", "adapters_base")):
        config = load_experiment(f"configs/shapes/{config}.py:runlocal", ["data.shapes.train_examples=2000"])
        experiment = Experiment(config, epath.Path(tmp_path / name))
        assert experiment.tokenizer is not None
        files.append(experiment.own_tokenizer.text)
    assert files[0] == files[1]


def test_a_run_of_the_shapes_world_reads_the_scenes_and_judges_images(tmp_path):
    config = load_experiment("configs/shapes/matching.py:runlocal", ["train_steps=2", "evaluation.final=()"])
    Experiment(config, epath.Path(tmp_path)).train()
    run = load(tmp_path)
    images = np.zeros((3, 32, 32, 3), np.uint8)
    found = run.run(["a red ring", "a star", "two stars"], conditions={"image": images})
    assert found["match"].shape == (3,) and ((found["match"] > 0) & (found["match"] < 1)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": "batch"}, r"changes=\('darker', 'brighter'\) with negatives='batch'"),
        ({"negatives": "batch", "changes": (), "batch_size": 1}, "there is no other image"),
    ],
)
def test_batches_without_false_captions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


def test_a_change_without_a_name_and_a_split_without_examples_are_refused(trained):
    made, weights = trained
    generator = types.SimpleNamespace(params=weights, frozen={})
    with pytest.raises(ValueError, match=r"has the number 1, and changes=\('darker',\)"):
        MatchingAccuracy(made.judge, ("darker",), batches=2)(generator, Split())
    with pytest.raises(ValueError, match="was given none"):
        MatchingAccuracy(made.judge)(generator)


def test_it_makes_no_latents_and_is_not_exported():
    made = recipe()
    with pytest.raises(ConfigError, match="makes no latents"):
        made.codec({}, {})
    with pytest.raises(ConfigError, match="draws nothing"):
        made.exports()
