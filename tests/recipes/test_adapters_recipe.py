"""Adapters as a recipe: a trained network stays as it is, and a few matrices beside it learn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from snapgen_jax.diffusion.schedules import FlowSchedule
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.networks.lora import LoraConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes.adapters import Adapters, AdaptersConfig
from snapgen_jax.recipes.flow_matching import FlowMatching
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import CheckpointConfig, Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.recipe import Recipe
from tests.recipes.test_flow_matching_recipe import CONFIG
from tests.recipes_for_tests import ByPosition, greys, saved_away_from_zero

LORA = LoraConfig(2, 4.0, ("attention/", "^text/token_embedding$", "conv_out"))
METHOD = FlowMatching(CONFIG, "cpu")
ONE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def fields(config):
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def adapters(base="", **changes):
    config = AdaptersConfig(**{**fields(CONFIG), "base": str(base), "lora": LORA, "train_steps": 8, **changes})
    return Adapters(config, "cpu")


def train(recipe, workdir, steps, **changes):
    """Updates on greys, saved every four."""
    checkpoint = CheckpointConfig(every_steps=4)
    config = LoopConfig(train_steps=steps, log_every_steps=2, tensorboard=False, checkpoint=checkpoint, **changes)
    return loop.train(recipe, ByPosition("8x8", lambda n: greys(n, 16)), config, workdir=workdir, mesh=ONE, quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The workdir of a network, and its averaged weights."""
    workdir = tmp_path_factory.mktemp("base")
    params = saved_away_from_zero(METHOD, workdir)
    return epath.Path(workdir), params


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The workdir of its adapters, and their state."""
    workdir = tmp_path_factory.mktemp("tuned")
    return epath.Path(workdir), train(adapters(base[0]), workdir, 8)


def first(recipe):
    """Its parameters before the first update."""
    return {"model": jax.jit(recipe.init)(key(0, 0, "init")).players["model"].params}


@jax.jit
def look(weights, batch):
    """The velocities of a network, and the loss of each example."""
    networks = {role: weights[role] for role in ("unet", "text")}
    losses, _, point = METHOD.examine(networks, METHOD.draw(networks, batch, jax.random.key(3)), {})
    return point.v, losses


def test_it_fulfils_the_protocol_and_returns_unique_roles(base):
    recipe = adapters(base[0])
    assert isinstance(recipe, Recipe) and isinstance(recipe.inputs, Inputs)
    frozen = recipe.load_frozen(None)
    assert (
        recipe.weights(first(recipe), frozen).keys()
        == {"adapters", "unet", "text"}
        == {"adapters", *recipe.frozen_spec()}
    )
    assert jax.tree.map(lambda s: (s.shape, s.dtype), recipe.frozen_spec()) == jax.tree.map(
        lambda x: (x.shape, x.dtype), frozen
    )


def test_its_checkpoint_holds_the_adapters_alone_and_the_network_stays(base, tuned):
    workdir, state = tuned
    checkpointer = Checkpointer(workdir)
    shapes = checkpointer.meta(8)["shapes"]
    checkpointer.close()
    arrays = [name for name in shapes if name.startswith(("ema/", "state/players"))]
    assert arrays and all("lora_" in name or name.endswith("count") for name in arrays)
    small = sum(np.prod(shape) for name, (shape, _) in shapes.items() if name.startswith("ema/"))
    assert small < 0.2 * sum(x.size for x in jax.tree.leaves(base[1]))
    assert fingerprint(adapters(base[0]).load_frozen(None)) == fingerprint(base[1])
    moved = flatten(state.players["model"].params["adapters"])
    assert all(np.any(matrix != 0) for matrix in moved.values())


def test_it_begins_as_the_network_and_ends_with_a_lower_loss(base, tuned):
    recipe = adapters(base[0])
    frozen = recipe.load_frozen(None)
    (v, losses), (begun, _) = look(base[1], greys(0, 16)), look(recipe.weights(first(recipe), frozen), greys(0, 16))
    ended, after = look(recipe.weights({"model": tuned[1].players["model"].params}, frozen), greys(0, 16))
    np.testing.assert_allclose(begun, v, atol=1e-6)
    assert jnp.abs(ended - v).max() > 1e-3 and after.mean() < losses.mean()


@pytest.mark.parametrize("use", ["generate", "validation_loss", "codec"])
def test_it_is_used_by_its_merged_weights(base, tuned, monkeypatch, use):
    recipe, params = adapters(base[0]), {"model": tuned[1].players["model"].ema}
    frozen = recipe.load_frozen(None)
    monkeypatch.setattr(recipe.method, use, lambda params, frozen, *rest: recipe.method.weights(params, frozen))
    arguments = {"generate": ({}, None, recipe.options), "validation_loss": ({}, None), "codec": ()}[use]
    used = getattr(recipe, use)(params, frozen, *arguments)
    assert fingerprint(used) == fingerprint(recipe.weights(params, frozen)) != fingerprint(frozen)


def test_it_starts_from_earlier_adapters(base, tuned):
    recipe = adapters(base[0])
    earlier = {"model": tuned[1].players["model"].ema}
    started = recipe.warm_start(jax.jit(recipe.init)(key(1, 0, "init")), earlier)
    assert fingerprint(started.players["model"].params) == fingerprint(earlier["model"])


def test_what_it_exports_are_the_merged_weights(base, tuned):
    recipe, method = adapters(base[0]), METHOD
    weights = recipe.weights({"model": tuned[1].players["model"].ema}, recipe.load_frozen(None))
    unit = next(unit for unit in recipe.exports().units if unit.name == "unet")
    inputs = {name: jnp.ones(spec.shape, spec.dtype) for name, spec in unit.inputs.items()}
    run = jax.jit(lambda weights: unit.function(weights, **inputs)["prediction"])
    plain = next(unit for unit in method.exports().units if unit.name == "unet")
    given, before = run(unit.select(weights)), run(plain.select(base[1]))
    assert jnp.abs(given - before).max() > 1e-4
    assert unit.roles == plain.roles and "adapters" not in unit.roles


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": ""}, "no network to start from: set base to a trained run"),
        ({"base": "nowhere"}, "'nowhere' is no trained run"),
    ],
)
def test_a_base_that_is_not_there_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        adapters(**changes).load_frozen(None)


def test_a_base_that_is_another_network_than_the_config_says_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="holds another network than the config describes"):
        adapters(base[0], network=dataclasses.replace(CONFIG.network, channels=(16,))).load_frozen(None)
    for said, message in (
        ({"prediction": "x_0"}, "has prediction='x_0', and prediction is 'velocity'; set it"),
        ({"schedule": {"kind": "vp"}}, "has schedule.kind='vp', and schedule.kind is 'flow'; set it"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"recipe": "flow_matching", **said}))
        with pytest.raises(ConfigError, match=message):
            adapters(tmp_path).load_frozen(None)
    assert FlowSchedule().kind == "flow"


def test_published_weights_are_asked_for_a_network_of_their_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 2}))
    with pytest.raises(ConfigError, match=r"of an MMDiT or a UNet alone or of a DiT and its classes: set"):
        adapters(tmp_path).load_frozen(None)


def test_a_target_that_finds_nothing_is_refused():
    with pytest.raises(ValueError, match="targets: 'decoder' finds no weight"):
        adapters(lora=LoraConfig(targets=("decoder",)))


def test_the_tokenizer_is_that_of_the_base(base):
    assert adapters(base[0]).tokenizers()["tokens"].workdir == str(base[0])
