"""Detection as a recipe: it learns what images show, and so tells what a caption demands from what it does not."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from snapgen_jax import inference_weights, train
from snapgen_jax.config import load_experiment
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.prompts import Demand, Requirement
from snapgen_jax.data.shapes import COLOURS, KINDS
from snapgen_jax.data.shapes_demands import numbers
from snapgen_jax.data.tokenizer_specs import load_tokenizers
from snapgen_jax.derivations.preference_pairs import Asked, Matched
from snapgen_jax.evaluation.matching import MatchingAccuracy
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.networks.detection import DetectionConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.recipes._rewards import Rewards, RewardSourceConfig
from snapgen_jax.recipes.detection import DetectionRecipe, DetectionRecipeConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step

CONFIG = DetectionRecipeConfig(
    batch_size=16,
    inputs=ImagesConfig(image_sizes=((8, 8),)),
    network=DetectionConfig.preset("smoke", channels=(16,), demands=1),
    most_objects=2,
    changes=("colour", "number"),
    noise=0.02,
    blur=0.0,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    ema_decay=0.0,
)
PALETTE = np.asarray(list(COLOURS.values()), np.uint8)


def recipe(**changes):
    return DetectionRecipe(dataclasses.replace(CONFIG, **changes), "cpu")


def batch(seed):
    """One or two squares of one colour; the false demand names another colour, or another number."""
    rng = np.random.default_rng(seed)
    image = np.full((16, 8, 8, 3), 240, np.uint8)
    objects, places = np.zeros((16, 2, 2), np.int32), np.zeros((16, 2, 2), np.float32)
    demands, others, changed = [], [], rng.integers(0, 2, 16).astype(np.int32)
    for n in range(16):
        colour, count = int(rng.integers(len(COLOURS))), int(rng.integers(1, 3))
        for row, side in enumerate(rng.permutation(2)[:count]):
            x, y = int(4 * side + rng.integers(0, 2)), int(rng.integers(0, 6))
            image[n, y : y + 3, x : x + 3] = PALETTE[colour]
            objects[n, row] = 1 + KINDS.index("square"), 1 + colour
            places[n, row] = (x + 1.5) / 4 - 1, (y + 1.5) / 4 - 1
        names = tuple(COLOURS)
        other = (names[colour], 3 - count) if changed[n] else (names[colour - 1], count)
        for rows, (name, number) in ((demands, (names[colour], count)), (others, other)):
            rows.append(numbers(Requirement((Demand("square", number, name),)), CONFIG.network.length))
    arrays = {"demands": np.stack(demands), "other_demands": np.stack(others), "changed": changed}
    return {"image": image, "objects": objects, "places": places, **arrays}


@pytest.fixture(scope="module")
def trained():
    made = recipe(train_steps=300)
    state = train(made, (batch(n) for n in range(1000)), steps=300, quiet=True)
    return made, inference_weights(state)


class Split:
    """A validation split of these batches."""

    def __iter__(self):
        for n in range(2000, 2100):
            yield types.SimpleNamespace(arrays=batch(n), valid=np.ones(16, bool))


def test_it_learns_to_count_and_to_name_and_the_evaluator_says_so_by_what_was_changed(trained):
    made, weights = trained
    assert isinstance(made, Recipe)
    (spec,) = made.evaluators()
    numbers = MatchingAccuracy(spec.function, **spec.options, batches=8)(
        types.SimpleNamespace(params=weights, frozen={}), Split()
    ).numbers
    for name in ("colour", "number"):
        assert numbers[f"matching.accuracy.{name}"] > 0.85 and numbers[f"matching.ranked.{name}"] > 0.9


def test_an_object_counts_as_much_as_it_shows(trained):
    """The mass of an object that is blended into the background, and so the way to one that is missing."""
    made, weights = trained
    one = batch(5)
    keys = jax.random.split(jax.random.key(0), 16)

    def mass(share):
        image = np.rint(share * one["image"] + (1 - share) * 240.0).astype(np.uint8)
        given = {"image": image, "demands": one["demands"]}
        return made.generate(weights, {}, given, keys, made.options)["density"].sum((1, 2, 3))

    count = (one["objects"][..., 0] > 0).sum(1)
    masses = [float(np.mean(mass(share) / count)) for share in (0.0, 0.3, 0.6, 1.0)]
    assert masses == sorted(masses) and masses[0] < 0.15 and 0.85 < masses[-1] < 1.15 and 0.1 < masses[1] < 0.6


def test_a_mixture_shows_a_part_of_the_objects_of_an_image_and_of_another_or_of_none():
    made, one = recipe(mixed=1.0, noise=0.0), batch(0)
    one["image"][:, ::7, ::7] = 240  # of the background
    drawn = made.draw(one, key(0, 0, "step"))
    own, others = (np.asarray(drawn["amounts"])[:, place, None, None, None] for place in (0, 2))
    np.testing.assert_array_equal(drawn["amounts"], np.stack([own, own, others, others], axis=1).reshape(16, 4))
    with_other = others > 0
    assert 3 < with_other.sum() < 13
    np.testing.assert_allclose((own + others)[with_other], 1, atol=1e-6)
    second = np.where(with_other, np.roll(one["image"], 1, axis=0), 240)
    expected = own * one["image"] / 255 + (1 - own) * second / 255
    np.testing.assert_allclose(drawn["image"], expected, atol=1e-5)
    np.testing.assert_array_equal(drawn["objects"][:, 2:], np.roll(one["objects"], 1, axis=0))
    whole = recipe(mixed=0.0).draw(one, key(0, 0, "step"))
    np.testing.assert_array_equal(whole["amounts"], np.repeat([[1, 0]], 16, axis=0).repeat(2, axis=1))


def test_parts_of_a_batch_give_the_gradient_of_the_whole_and_weights_start_a_run():
    def stepped(microbatches):
        made = recipe(microbatches=microbatches)
        state = jax.jit(made.init)(key(0, 0, "init"))
        return state, *jax.jit(make_step(made, 0))(state, {}, batch(0))

    (first, after, metrics), (_, _, parts) = stepped(1), stepped(4)
    np.testing.assert_allclose(metrics["grad_norm"], parts["grad_norm"], rtol=1e-4)
    made = recipe()
    warm = made.warm_start(first, {"model": after.players["model"].params})
    for path, leaf in flatten(warm.players["model"].params).items():
        np.testing.assert_array_equal(leaf, flatten(after.players["model"].params)[path])


def test_it_reads_what_captions_demand():
    made = recipe()
    assert made.tokenizers() == dict.fromkeys(("demands", "other_demands"), TokenizerSpec("demands", 4, 9))
    assert made.conditions() == ("demands", "image")
    specs = made.batch_specs()["8x8"]
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        name: (array.shape, array.dtype) for name, array in batch(0).items()
    }
    assert "changed" not in recipe(changes=()).batch_specs()["8x8"]


def test_a_run_of_the_shapes_world_is_a_judge_of_images_and_goes_on_bit_for_bit(tmp_path):
    def run(name, steps):
        overrides = [f"train_steps={steps}", "evaluation.final=()", "evaluation.during=()", "checkpoint.every_steps=2"]
        config = load_experiment("configs/shapes/detection.py:runlocal", [*overrides, "optimizer.schedule=constant"])
        return Experiment(config, epath.Path(tmp_path / name)).train()

    run("whole", 4)
    run("parts", 2)
    run("parts", 4)
    weights = [flatten(load(tmp_path / name).params) for name in ("whole", "parts")]
    for path, leaf in weights[0].items():
        np.testing.assert_array_equal(leaf, weights[1][path])
    judge = load(tmp_path / "parts")
    prompts = ["a red ring", "two stars left of a cross"]
    images = np.zeros((2, 32, 32, 3), np.uint8)
    scores = Matched(judge, 2)(images, [Asked(prompt, Requirement(())) for prompt in prompts])
    assert scores.shape == (2,) and ((scores > 0) & (scores < 1)).all()
    with pytest.raises(DataError, match="'a moon' is no caption whose demands can be read"):
        judge.run(["a moon"], conditions={"image": images[:1]})

    network = judge.recipe.config.network
    source = RewardSourceConfig(network=network, weight=2.0, workdir=str(tmp_path / "parts"))
    rewards = Rewards({"seen": source}, {"tokens": TokenizerSpec("trained", 6, 32)}, "cpu")
    assert rewards.arrays() == ("seen_tokens",)
    tokens = load_tokenizers(rewards.tokenizers(), None).arrays(prompts, {"seen_tokens": network.length})
    assert {name: spec.shape for name, spec in rewards.specs(2).items()} == {"seen_tokens": tokens["seen_tokens"].shape}
    found = rewards(rewards.load(None, rewards.tokenizers()), jnp.asarray(images, jnp.float32), tokens)
    np.testing.assert_allclose(found["seen"], scores, rtol=1e-5)
    np.testing.assert_allclose(rewards.total(found), 2 * scores, rtol=1e-5)


def test_it_makes_no_latents_and_is_not_exported():
    made = recipe()
    with pytest.raises(ConfigError, match="a detection run makes no latents"):
        made.codec({}, {})
    with pytest.raises(ConfigError, match="a detection run draws nothing"):
        made.exports()
