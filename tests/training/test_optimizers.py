"""Optimizers by name: each learns, resumes bit for bit, lies over the devices as its parameters do, and decays kernels
and embeddings alone."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from snapgen_jax.config import complete, load_config, load_experiment
from snapgen_jax.networks.counting import CONFIGS
from snapgen_jax.networks.module import build, flatten
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.plan import plan_step, topology, tree_bytes
from snapgen_jax.parallel.sharding import path_name, tree_shardings
from snapgen_jax.training import loop
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.optimizer import (
    Elementwise,
    OptimizerConfig,
    decayed,
    learning_rate_schedule,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.ravel import RavelledPlayer, gather
from snapgen_jax.training.state import TrainState
from snapgen_jax.training.step import lower_abstract_step
from tests.recipes_for_tests import ONE_STAGE, Sequences, TwoPlayers, train_and_read

NAMES = ("adamw", "adafactor", "lion", "muon", "sm3", "sgd")
ELEMENTWISE = ("adamw", "lion", "sgd")
RATES = {"lion": 1e-2, "sgd": 3e-1, "sm3": 1e-1, "muon": 1e-1}
QUICKSTART = "configs/shapes/quickstart.py:runlocal"


def config(name, **changes):
    return OptimizerConfig(name=name, **{"learning_rate": RATES.get(name, 3e-2), "warmup_steps": 0, **changes})


def recipe(name, lengths=(4,)):
    """Fits a linear map, with weight decay."""
    made = TwoPlayers(lengths=lengths, train_steps=24)
    made.optimizer = make_optimizer(config(name), 24)
    return made


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """{name: (last state, metrics)} of 24 updates on one device."""
    folder = tmp_path_factory.mktemp("straight")
    made = {name: recipe(name) for name in NAMES}
    return {name: train_and_read(m, Sequences(m), folder / name, 24) for name, m in made.items()}


@pytest.mark.parametrize("name", NAMES)
def test_each_lowers_the_loss(straight, name):
    losses = [line["loss"] for line in straight[name][1]]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:2]), losses


@pytest.mark.parametrize("name", NAMES)
def test_each_resumes_bit_for_bit(straight, name, tmp_path):
    for steps in (9, 24):
        made = recipe(name)
        state, lines = train_and_read(made, Sequences(made), tmp_path, steps)
    same(jax.device_get(state.players), jax.device_get(straight[name][0].players))
    assert lines == straight[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_the_state_lies_over_two_devices_as_its_parameters_do(straight, name):
    made = recipe(name)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    settings = LoopConfig(train_steps=24, log_every_steps=24, tensorboard=False)
    state = loop.train(made, Sequences(made), settings, mesh=mesh, quiet=True)
    player = state.players["predictor"]
    split = PartitionSpec(None, "fsdp")
    assert player.params["kernel"].sharding.spec == split
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(player.opt_state)[0]
        if path_name(path).endswith("kernel") and leaf.shape == player.params["kernel"].shape
    ]
    assert len(moments) == {"adamw": 2, "adafactor": 2}.get(name, 1)
    assert all(leaf.sharding.spec == split for leaf in moments)
    alone = straight[name][0].players["predictor"].params
    np.testing.assert_allclose(player.params["kernel"], alone["kernel"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_with_another_optimizer_is_refused_by_what_differs(straight, name, tmp_path):
    other = NAMES[NAMES.index(name) - 1]
    train_and_read(recipe(other), Sequences(recipe(other)), tmp_path, 2)
    with pytest.raises(ConfigError, match=r"does not fit the config(.|\n)*opt_state"):
        train_and_read(recipe(name), Sequences(recipe(name)), tmp_path, 4)


@pytest.mark.parametrize("name", NAMES)
def test_its_state_is_kept_as_vectors_only_where_that_changes_nothing(name):
    """Kernels and biases, with decay of the former, against the same updates leaf by leaf."""
    optimizer = make_optimizer(config(name, weight_decay=0.3, clip_norm=0.0), 10)
    assert isinstance(optimizer, Elementwise) == (name in ELEMENTWISE)
    shapes = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": {"kernel": (4, 5), "scale": (5,)}}
    rng = np.random.default_rng(0)

    def draw():
        leaf = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
        return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))

    player = new_player(draw(), optimizer, ema=True)
    carried = gather(TrainState(jnp.int32(0), jnp.int32(0), {"model": player}, {})).players["model"]
    assert isinstance(carried, RavelledPlayer) == (name in ELEMENTWISE)
    for step in range(3):
        grads = draw()
        player, _ = step_player(player, grads, optimizer, jnp.int32(step), ema_decay=0.9)
        carried, _ = step_player(carried, grads, optimizer, jnp.int32(step), ema_decay=0.9)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), carried.params, player.params)


# --- weight decay ----------------------------------------------------------------------------------------------------


def test_of_the_unet_the_kernels_decay_and_nothing_else():
    flags = flatten(decayed(build(UNetConfig.preset("smoke", **ONE_STAGE))[1]))
    outside = {"/".join(path): flag for path, flag in flags.items() if path[0] not in ("down", "up")}
    assert sorted(path for path, flag in outside.items() if flag) == [
        "conv_in/kernel",
        "conv_out/kernel",
        *(f"mid_residual/conv_{i}/{part}/kernel" for i in (1, 2) for part in ("depthwise", "pointwise")),
        "mid_residual/embedding/kernel",
        *(f"mid_transformer/blocks/block_00/cross_attention/{n}/kernel" for n in ("key", "out", "query", "value")),
        *(f"mid_transformer/blocks/block_00/ffn/{name}/kernel" for name in ("inner", "outer")),
        *(f"mid_transformer/project_{name}/kernel" for name in ("in", "out")),
        *(f"{name}/{layer}/kernel" for name in ("pooled", "time") for layer in ("inner", "outer")),
    ]
    assert {"norm_out/scale", "mid_transformer/blocks/block_00/cross_attention/key_norm/scale"} <= outside.keys()
    for preset in ("t2i", "imagenet"):
        flags = flatten(decayed(build(UNetConfig.preset(preset))[1]))
        assert {path[-1] for path, flag in flags.items() if flag} == {"kernel"}
        assert {path[-1] for path, flag in flags.items() if not flag} == {"bias", "scale"}


def test_of_every_network_no_vector_decays_but_the_class_token():
    kept = set()
    for network in CONFIGS:
        for preset in network.PRESETS:
            spec = build(network.preset(preset))[1]
            flags = flatten(decayed(spec))
            assert not any(flag for path, flag in flags.items() if path[-1] in ("bias", "scale", "offset"))
            kept |= {path[-1] for path, leaf in flatten(spec).items() if len(leaf.shape) < 2 and flags[path]}
    assert kept == {"class_embedding"}


@pytest.mark.parametrize("name", NAMES)
def test_without_gradient_what_decays_shrinks_by_rate_and_decay_and_the_rest_stays(name):
    optimizer = make_optimizer(config(name, learning_rate=0.5, weight_decay=0.25), 10)
    leaves = {"kernel": (4, 3), "bias": (3,), "scale": (3,), "distance_bias": (3, 4), "token_embedding": (4, 3)}
    params = {"layer": {leaf: jnp.ones(shape) for leaf, shape in leaves.items()}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    after = optax.apply_updates(params, updates)["layer"]
    for leaf in ("kernel", "token_embedding"):
        np.testing.assert_allclose(after[leaf], 1 - 0.5 * 0.25, rtol=1e-6)
    for leaf in ("bias", "scale", "distance_bias"):
        np.testing.assert_array_equal(after[leaf], 1.0)


# --- each by what is its own -----------------------------------------------------------------------------------------


def step_of(name, params, grads, **changes):
    optimizer = make_optimizer(config(name, learning_rate=1.0, weight_decay=0.0, **changes), 10)
    return optimizer.update(grads, optimizer.init(params), params)


def test_adamw_is_what_it_was_and_a_config_without_a_name_is_adamw():
    """State and steps are those of `optax.adamw`, so that runs of before go on."""
    settings = OptimizerConfig()
    assert settings.name == "adamw"
    params = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    grads = jax.tree.map(lambda x: 0.3 * x, params)
    mask = {"a": {"kernel": True, "bias": False}}
    schedule = learning_rate_schedule(settings, 10)
    expected = optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, mask=mask)
    ours = make_optimizer(settings, 10)
    states = [optimizer.init(params) for optimizer in (ours, expected)]
    for _ in range(3):
        both = [o.update(grads, s, params) for o, s in zip((ours, expected), states, strict=True)]
        same(both[0], both[1])
        states = [state for _, state in both]
    before = load_config(QUICKSTART).to_dict()
    del before["optimizer"]["name"]
    assert complete(before).optimizer.name == "adamw"


def test_lion_steps_by_the_sign_and_sgd_by_the_gradient():
    params = {"a": {"kernel": jnp.ones((2, 2))}}
    grads = {"a": {"kernel": jnp.asarray([[3.0, -0.1], [0.5, -9.0]])}}
    lion, _ = step_of("lion", params, grads)
    np.testing.assert_array_equal(lion["a"]["kernel"], -jnp.sign(grads["a"]["kernel"]))
    sgd, state = step_of("sgd", params, grads, b1=0.0)
    np.testing.assert_array_equal(sgd["a"]["kernel"], -grads["a"]["kernel"])
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.shape], "without momentum it keeps nothing"


def test_muon_makes_the_steps_of_kernels_orthogonal_and_no_others():
    shapes = {"linear": (6, 4), "stacked": (3, 4, 6), "conv": (3, 3, 2, 8), "depthwise": (3, 3, 1, 8)}
    rng = np.random.default_rng(0)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}
    params["text"] = {"token_embedding": jnp.ones((5, 3)), "bias": jnp.ones(3)}
    updates, _ = step_of("muon", params, params)
    for name, rows in {"linear": 6, "stacked": 4, "conv": 18}.items():
        for matrix in np.asarray(updates[name]["kernel"]).reshape(-1, rows, shapes[name][-1]):
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            assert singular.min() > 0.6 and singular.max() < 1.3, name
    for leaf in (updates["depthwise"]["kernel"], *updates["text"].values()):
        np.testing.assert_allclose(np.abs(leaf), 1.0, rtol=1e-4)  # Adam's first step


def test_adafactor_and_sm3_keep_vectors_of_a_large_matrix():
    params = {"a": {"kernel": jnp.ones((256, 384)), "bias": jnp.ones(384)}}
    whole = tree_bytes(params)
    bytes_of = {
        name: tree_bytes(jax.eval_shape(make_optimizer(config(name, b1=b1), 10).init, params))
        for name, b1 in [("adamw", 0.9), ("adafactor", 0.0), ("sm3", 0.9), ("lion", 0.9), ("sgd", 0.9), ("muon", 0.9)]
    }
    assert bytes_of["adafactor"] < 0.02 * whole
    for name in ("sm3", "lion", "sgd", "muon"):
        assert whole <= bytes_of[name] < 1.02 * whole
    assert 2 * whole <= bytes_of["adamw"] < 2.01 * whole


def test_a_name_that_is_none_gets_the_closest():
    with pytest.raises(ConfigError, match=r"optimizer\.name' is 'adamv'; choose one of .*did you mean 'adamw'\?"):
        load_config(QUICKSTART, ["optimizer.name=adamv"])
    with pytest.raises(ConfigError, match=r"did you mean 'adafactor'\?"):
        load_config(QUICKSTART, ["optimizer.name=adafacter"])


@pytest.mark.parametrize("name", NAMES)
def test_of_the_moments_of_the_unet_those_of_a_parameters_shape_lie_where_it_does(name):
    made = load_experiment(QUICKSTART, [f"optimizer.name={name}"]).build("cpu")
    state = jax.eval_shape(made.init, key(0, 0, "init"))
    placed = tree_shardings(state, made.rules(), make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2]))

    def leaves(players):
        player = players["model"]
        return [{path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
                for tree in (player.params, player.opt_state)]  # fmt: skip

    (params, moments), (param_places, places) = leaves(state.players), leaves(placed.players)
    assert any(place.spec != PartitionSpec() for place in param_places.values())
    found = 0
    for path, leaf in moments.items():
        for parameter, param in params.items():
            if path.endswith(f"/{parameter}") and leaf.shape == param.shape:
                assert places[path].spec == param_places[parameter].spec
                found += 1
    assert found >= len(params)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_each_is_planned_for_a_pod(name):
    made, where = recipe(name), topology("v5e:2x2")
    mesh = make_mesh(MeshConfig(fsdp=2), where.devices)
    lowered, state = lower_abstract_step(made, 0, mesh, "length4")
    facts = {"part": "", "bucket": "length4", "global_batch": made.batch_size, "train_steps": 24}
    found = plan_step(lowered, where, mesh, state=state, **facts)
    assert found.fits
    assert found.state_bytes == tree_bytes(jax.eval_shape(made.init, key(0, 0, "init")))
