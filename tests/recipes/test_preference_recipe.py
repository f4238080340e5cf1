"""Diffusion-DPO: its loss is the paper's, it begins at log 2, and it learns which of two images is preferred."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from snapgen_jax.config import load_experiment
from snapgen_jax.data import shards
from snapgen_jax.diffusion.path import interpolate, velocity
from snapgen_jax.experiment import Experiment
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.losses.preference import preference_loss, preference_margin
from snapgen_jax.networks.lora import LoraConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.recipes.flow_matching import FlowMatching
from snapgen_jax.recipes.preference import Preference, PreferenceConfig, ranked
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes.test_flow_matching_recipe import CONFIG
from tests.recipes_for_tests import greys

LORA = LoraConfig(2, 4.0, ("unet/.*attention/", "unet/conv_out"))
BETA = 50.0
ROUNDING = BETA * 1e-6  # of a margin: errors of a few, in float32


def recipe(base="", **changes):
    fields = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
    fields["inputs"] = dataclasses.replace(CONFIG.inputs, caption_dropout=0.0)
    fields["optimizer"] = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.0)
    return Preference(PreferenceConfig(**{**fields, "base": str(base), "lora": LORA, "beta": BETA, **changes}), "cpu")


def pairs(seed=0, size=16):
    """Greys of which those with a white upper half are preferred to those with a black one."""
    found = greys(seed, size)
    other = found["image"].copy()
    found["image"][:, :4], other[:, :4] = 255, 0
    return {**found, "other_image": other}


@pytest.fixture(scope="module")
def frozen():
    """A network, away from zero."""
    method, random = FlowMatching(CONFIG, "cpu"), np.random.default_rng(1)
    drawn = jax.jit(method.init)(key(0, 0, "init")).players["model"].params
    return jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), drawn)


@pytest.fixture(scope="module", params=["adapters", "network"])
def made(request):
    return recipe(trains=request.param)


@pytest.fixture(scope="module")
def trained(made, frozen):
    """States and metrics of forty updates on one set of pairs."""
    state, step = jax.jit(made.init)(key(0, 0, "init")), jax.jit(make_step(made, 0))
    states, metrics = [state], []
    for n in range(40):
        state, found = step(state, frozen, pairs(n % 2))
        metrics.append({name: float(value) for name, value in found.items()})
        states.append(state)
    return states, metrics


@pytest.fixture(scope="module")
def loss(made):
    """`loss(params, frozen, batch)`: the loss of one draw and the mean margin, and the gradient by what learns."""

    def value(params, frozen, batch):
        drawn = made.pair(made.weights({"model": params}, frozen), batch, jax.random.key(3))
        margin = made.margin(made.weights({"model": params}, frozen), frozen, drawn)
        return preference_loss(margin).mean(), margin.mean()

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def first(made):
    return jax.jit(made.init)(key(0, 0, "init")).players["model"].params


def size_of(tree):
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))))


def test_it_fulfils_the_protocol_and_its_batch_has_both_images(made, frozen):
    assert isinstance(made, Recipe) and isinstance(made.inputs, Inputs)
    specs = made.batch_specs()["8x8"]
    assert specs["other_image"] == specs["image"] and {"tokens", "mask"} < set(specs)
    (role,) = made.trains["model"]
    assert set(first(made)) == {role}
    assert set(made.weights({"model": first(made)}, frozen)) == {"unet", "text", role}


def test_the_loss_is_the_papers_in_numpy():
    """Equation 14 for two pairs, errors as they stand."""
    better, reference = np.array([1.0, 0.3]), np.array([1.2, 0.2])
    worse, worse_reference, scale = np.array([0.7, 0.9]), np.array([0.6, 1.4]), np.array([3.0, 5.0])
    inside = -scale * ((better - reference) - (worse - worse_reference))
    margin = preference_margin(*map(jnp.asarray, (better, reference, worse, worse_reference, scale)))
    np.testing.assert_allclose(margin, inside, rtol=1e-6)
    np.testing.assert_allclose(preference_loss(margin), -np.log(1 / (1 + np.exp(-inside))), rtol=1e-6)
    np.testing.assert_array_equal(ranked(jnp.array([2.0, -1.0, 0.0, 1e-4])), [1.0, 0.0, 0.5, 0.5])


def test_its_margin_is_of_the_velocities_at_one_noise_and_time(made, frozen, trained):
    """Against the same in NumPy, from what the two networks predict."""
    networks = made.weights({"model": trained[0][-1].players["model"].params}, frozen)
    drawn = jax.jit(made.pair)(networks, pairs(), jax.random.key(5))
    better, worse = drawn["better"], drawn["worse"]
    for name in ("eps", "level", "condition"):
        jax.tree.map(np.testing.assert_array_equal, better[name], worse[name])
    assert jnp.abs(better["x_0"] - worse["x_0"]).max() > 1

    @jax.jit
    def v(networks, one):
        x_t = interpolate(one["x_0"], one["eps"], one["level"].t)
        condition = made.inputs.condition(networks, one["condition"])
        return made.method.denoiser(networks["unet"], x_t, one["level"], condition)[0]

    def error(networks, one):
        off = np.asarray(velocity(one["x_0"], one["eps"]), np.float64) - np.asarray(v(networks, one), np.float64)
        return np.square(off).mean(axis=(1, 2, 3))

    inside = [error(networks, one) - error(frozen, one) for one in (better, worse)]
    margin = jax.jit(made.margin)(networks, frozen, drawn)
    np.testing.assert_allclose(margin, -BETA * (inside[0] - inside[1]), rtol=1e-3, atol=1e-3)
    assert jnp.abs(margin).min() > 1e-3


def test_it_begins_at_log_two_with_a_gradient_towards_the_preferred_image(made, frozen, loss):
    params = first(made)
    (value, margin), gradient = loss(params, frozen, pairs())
    np.testing.assert_allclose([value, margin], [np.log(2), 0], atol=ROUNDING)
    swapped = {**pairs(), "image": pairs()["other_image"], "other_image": pairs()["image"]}
    _, opposite = loss(params, frozen, swapped)
    scale = 1e-4 * size_of(gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-3, atol=scale), gradient, opposite)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * g / size_of(gradient), params, gradient)
    value, margin = loss(moved, frozen, pairs())[0]
    assert margin > 10 * ROUNDING and value < np.log(2) - ROUNDING


def test_two_equal_images_teach_nothing(made, frozen, trained, loss):
    equal, size = {**pairs(), "other_image": pairs()["image"]}, size_of(loss(first(made), frozen, pairs())[1])
    for state in (trained[0][0], trained[0][-1]):
        (value, margin), gradient = loss(state.players["model"].params, frozen, equal)
        np.testing.assert_allclose([value, margin], [np.log(2), 0], atol=ROUNDING)
        assert size_of(gradient) < 1e-4 * size


def test_on_one_set_of_pairs_it_learns_which_is_preferred_and_the_reference_stays(made, frozen, trained):
    states, metrics = trained
    assert metrics[0]["accuracy"] == 0.5 and abs(metrics[0]["margin"]) < ROUNDING
    np.testing.assert_allclose(metrics[0]["loss"], np.log(2), atol=ROUNDING)
    assert np.mean([m["accuracy"] for m in metrics[-5:]]) > 0.9
    assert np.mean([m["loss"] for m in metrics[-5:]]) < 0.9 * np.log(2)
    before = fingerprint(frozen)
    validate = jax.jit(made.validation_loss)
    begun, ended = (
        validate({"model": state.players["model"].params}, frozen, pairs(9), jax.random.key(0))
        for state in (states[0], states[-1])
    )
    assert (begun["accuracy"] == 0.5).all() and ended["accuracy"].mean() > 0.9
    assert ended["mean"].mean() < begun["mean"].mean() and ended["margin"].mean() > 0
    assert fingerprint(frozen) == before
    moved = flatten(states[-1].players["model"].params)
    assert any(np.any(leaf != 0) for leaf in moved.values())


def test_parts_of_a_batch_give_the_gradient_of_the_whole(frozen):
    def stepped(microbatches):
        made = recipe(microbatches=microbatches)
        state = jax.jit(made.init)(key(0, 0, "init"))
        return jax.jit(make_step(made, 0))(state, frozen, pairs())[1]

    np.testing.assert_allclose(stepped(1)["grad_norm"], stepped(2)["grad_norm"], rtol=1e-3)


def test_a_small_difference_to_weights_of_bfloat16_is_not_rounded_away(frozen):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    change = {"unet": jax.tree.map(lambda x: jnp.full(x.shape, 1e-4), half["unet"])}
    moved = recipe(trains="network").weights({"model": {"difference": change}}, half)["unet"]
    for after, before in zip(jax.tree.leaves(moved), jax.tree.leaves(half["unet"]), strict=True):
        np.testing.assert_allclose(after - before.astype(jnp.float32), 1e-4, atol=1e-6)


def test_the_reference_is_read_from_the_base_run(frozen, tmp_path):
    method = FlowMatching(CONFIG, "cpu")
    state = jax.jit(method.init)(key(0, 0, "init"))
    state = state.replace(players={"model": state.players["model"].replace(ema=frozen)})
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, 0, {})
    checkpointer.close()
    made = recipe(tmp_path)
    assert fingerprint(made.load_frozen(None)) == fingerprint(frozen)
    assert made.tokenizers()["tokens"].workdir == str(tmp_path)
    with pytest.raises(ConfigError, match="no network to start from: set base"):
        recipe().load_frozen(None)


def test_numbers_and_inputs_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="beta"):
        recipe(beta=0.0)
    with pytest.raises(ValueError, match="finds no weight"):
        recipe(lora=LoraConfig(targets=("decoder",)))


def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (grey,) * 3).save(file, "png")
    return file.getvalue()


def test_pairs_are_read_from_shards_with_one_crop(tmp_path):
    """The source "stored" has both images of an example; the config is that of the shapes world."""
    records = (
        {"image": png(n), "other_image": png(100 + n), "captions": ["a ring"], "height": 32, "width": 32}
        for n in range(20)
    )
    shard = shards.write_shard(tmp_path / "pairs", shards.shard_name("pairs", 0, 1), records)
    arrays = {name: shards.StoredArray("bytes") for name in ("other_image", "image")}
    shards.Manifest("images", {**arrays, "captions": shards.StoredArray("text", captions=True)}, (shard,)).write(
        tmp_path / "pairs"
    )
    changes = [f"data.path={tmp_path / 'pairs'}", f"base={tmp_path / 'base'}"]
    config = load_experiment("configs/shapes/preference.py:runlocal", changes)
    source = Experiment(config, epath.Path(tmp_path / "run")).source
    assert list(source.spec()) == ["image", "other_image", "caption"]
    example = source.example(3, np.random.default_rng(0))
    assert int(example["other_image"][0, 0, 0]) - int(example["image"][0, 0, 0]) == 100
    assert set(source.example(3, np.random.default_rng(0), ("other_image",))) == {"other_image", "caption"}
