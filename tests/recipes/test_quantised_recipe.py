"""Quantisation-aware training as a recipe: a trained network goes on in weights of few levels."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from snapgen_jax.diffusion.schedules import FlowSchedule, VPSchedule
from snapgen_jax.export.storage import describe_storage
from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.quantise import kernel_path
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.recipes.quantised import SCALES, Quantised, QuantisedConfig
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import random_like

NETWORK = UNetConfig.preset(
    "smoke", latent_channels=12, channels=(8,), down_depth=(1,), up_depth=(0,), mid_depth=0,
    self_attention=(False,), cross_attention=(True,),
)  # fmt: skip
SHARED = {
    "batch_size": 8,
    "train_steps": 40,
    "network": NETWORK,
    "inputs": ClassLabelsConfig(
        image_sizes=((8, 8),), codec=CodecConfig(patch=2), label=LabelEmbeddingConfig(classes=4, width=16)
    ),
}
METHOD = FlowMatching(FlowMatchingConfig(**SHARED), "cpu")
CONFIG = QuantisedConfig(
    **SHARED, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0), init_from="base"
)
LAYER = "mid_residual/conv_1/pointwise"
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8),
    "label": np.arange(8, dtype=np.int32) % 4,
}


def recipe(**changes):
    return Quantised(dataclasses.replace(CONFIG, **changes), "cpu")


RECIPE = recipe(bits={LAYER: 1})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The workdir of a network, and its averaged weights."""
    workdir = tmp_path_factory.mktemp("base")
    state = jax.jit(METHOD.init)(key(0, 0, "init"))
    params = random_like(jax.eval_shape(lambda: state.players["model"].ema), 1)
    state = state.replace(players={"model": state.players["model"].replace(ema=params)})
    checkpointer = Checkpointer(workdir)
    checkpointer.save(state, 0, {})
    checkpointer.close()
    return epath.Path(workdir), params


def begun(of, base):
    """Its state before the first update, and its frozen networks."""
    workdir, params = base
    of = Quantised(dataclasses.replace(of.config, init_from=str(workdir)), "cpu")
    state = of.warm_start(jax.jit(of.init)(key(0, 0, "init")), {"model": params})
    return state, of.load_frozen(None)


@pytest.fixture(scope="module")
def trained(base):
    """Stage I: the first state, the last one, the frozen networks, and the metrics of every update."""
    first, frozen = begun(RECIPE, base)
    state, step, history = first, jax.jit(make_step(RECIPE, 0)), []
    for _ in range(30):
        state, metrics = step(state, frozen, BATCH)
        history.append(jax.device_get(metrics))
    return first, state, frozen, history


def test_it_fulfils_the_protocol_and_returns_unique_roles(base):
    assert isinstance(RECIPE, Recipe) and isinstance(RECIPE.inputs, Inputs)
    assert RECIPE.trains == {"model": ("unet", SCALES)}
    state, frozen = begun(RECIPE, base)
    assert set(frozen) == {"teacher/unet", "label"} == set(RECIPE.frozen_spec())
    weights = RECIPE.weights({"model": state.players["model"].params}, frozen)
    assert weights.keys() == {"unet", SCALES, "teacher/unet", "label"}
    assert jax.tree.map(jnp.shape, RECIPE.frozen_spec()) == jax.tree.map(jnp.shape, frozen)


def test_it_starts_from_the_trained_weights_and_learns_from_them(base):
    state, frozen = begun(RECIPE, base)
    assert fingerprint(frozen["teacher/unet"]) == fingerprint(base[1]["unet"])
    assert fingerprint(state.players["model"].params["unet"]) == fingerprint(base[1]["unet"])
    scales = flatten(state.players["model"].params[SCALES])
    assert scales[*LAYER.split("/"), "b1_scale"].shape == (NETWORK.channels[0] * 2,)


def test_stage_one_draws_nearer_to_the_network_as_it_was(trained):
    first, last, frozen, history = trained
    assert {"loss", "loss/output", "loss/feature", "grad_norm"} <= set(history[0])
    np.testing.assert_allclose(
        history[0]["loss"], history[0]["loss/output"] + 0.01 * history[0]["loss/feature"], rtol=1e-5
    )
    validate = jax.jit(RECIPE.validation_loss)
    errors = [
        jax.tree.map(
            lambda x: float(jnp.mean(x)),
            validate({"model": state.players["model"].params}, frozen, BATCH, jax.random.key(0)),
        )
        for state in (first, last)
    ]
    assert errors[1]["image_error"] < 0.8 * errors[0]["image_error"]
    plain = {"model": {"unet": frozen["teacher/unet"]}}
    loss = jax.jit(METHOD.validation_loss)(plain, {"label": frozen["label"]}, BATCH, jax.random.key(0))["mean"]
    assert errors[0]["unquantised"] == errors[1]["unquantised"] == pytest.approx(float(loss.mean()), rel=1e-5)
    without = dict(frozen)
    del without["teacher/unet"]
    numbers = jax.eval_shape(
        lambda: RECIPE.validation_loss({"model": last.players["model"].params}, without, BATCH, jax.random.key(0))
    )
    assert "mean" in numbers and not any("image_error" in name or name == "unquantised" for name in numbers)


def test_both_networks_are_told_the_same_condition_and_the_scales_are_trained(trained):
    first, last, frozen, _ = trained
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first.players["model"].params, last.players["model"].params)
    # A label is one token, whatever the query and the key.
    still = {name for name in RECIPE.bits if name.endswith(("cross_attention/query", "cross_attention/key"))}
    for name in set(RECIPE.bits) - still:
        assert flatten(moved["unet"])[kernel_path(name)]
        assert flatten(moved[SCALES])[*name.split("/"), f"b{RECIPE.bits[name]}_scale"]
    # As it was, a network is no distance from itself, whatever is dropped.
    params = last.players["model"].params
    networks = {**RECIPE.weights({"model": params}, frozen), "unet": frozen["teacher/unet"]}
    loss = jax.jit(lambda n, b: RECIPE.loss(n, RECIPE.draw(n, b, jax.random.key(1)), {})[0])
    assert float(loss(networks, BATCH)) == 0.0


def test_an_export_stores_the_integers_of_the_weights_that_it_uses(trained):
    _, last, frozen, _ = trained
    weights = RECIPE.weights({"model": last.players["model"].params}, frozen)
    unit = next(unit for unit in RECIPE.exports().units if unit.name == "unet")
    described = describe_storage(unit, weights)  # raises where scale times integers is not the weight
    assert described[f"unet/{LAYER}/kernel"]["bits"] == 1 and described[f"unet/{LAYER}/kernel"]["levels"] == 3
    assert described["unet/conv_in/kernel"]["bits"] == 8
    assert len(described) == len(RECIPE.bits) and not any("time/" in path for path in described)
    stored = unit.stored(weights)[f"unet/{LAYER}/kernel"]
    assert stored.integers.dtype == np.int8 and (stored.scale > 0).all()


def test_an_exported_network_is_told_the_step_and_holds_no_layers_of_time(trained):
    _, last, frozen, _ = trained
    weights = RECIPE.weights({"model": last.players["model"].params}, frozen)
    plan, plain = RECIPE.exports(), recipe(bits={LAYER: 1}, exported_time="features").exports()
    ours, theirs = (next(unit for unit in p.units if unit.name == "unet") for p in (plan, plain))
    steps = RECIPE.options.steps
    assert plan.program["step"]["time"] == {"kind": "index", "size": steps} and "shift" not in plan.program
    assert plain.program["step"]["time"]["kind"] == "features" and "shift" in plain.program
    held = ours.select(weights)
    assert set(held["unet"]["time"]) == {"table"} and held["unet"]["time"]["table"].shape[0] == steps

    def both(i):
        given = {name: jnp.ones(spec.shape) for name, spec in ours.inputs.items()}
        features = time_features(jnp.asarray(plan.program["times"])[i][None], NETWORK.time_width)
        rows = ours.function(held, **{**given, "time": jax.nn.one_hot(i, steps)[None]})["prediction"]
        return rows, theirs.function(theirs.select(weights), **{**given, "time": features})["prediction"]

    rows, layers = jax.jit(jax.vmap(both))(jnp.array([0, 3, steps - 1]))
    np.testing.assert_allclose(rows, layers, atol=1e-6 * float(jnp.abs(layers).max()))
    assert float(jnp.abs(layers[0] - layers[1]).max()) > 1e-3


def test_stage_two_learns_from_data_and_starts_from_stage_one(trained, base, tmp_path):
    _, last, frozen, _ = trained
    second = recipe(bits={LAYER: 1}, learns_from="data", base=str(base[0]), init_from=str(tmp_path))
    assert set(second.frozen_spec()) == {"label"}
    earlier = {"model": last.players["model"].params}
    started = second.warm_start(jax.jit(second.init)(key(1, 0, "init")), earlier)
    assert fingerprint(started.players["model"].params) == fingerprint(earlier["model"])
    networks = second.weights({"model": started.players["model"].params}, {"label": frozen["label"]})
    losses = jax.jit(lambda n, b: [r.examine(n, r.draw(n, b, jax.random.key(1)), {})[0] for r in (second, METHOD)])
    ours, _ = losses(networks, BATCH)
    assert ours.shape == (8,) and float(ours.mean()) > 0
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "quantised"}))
    with pytest.raises(ConfigError, match="is a quantised run, and stage I learns from the network as it was"):
        recipe(init_from=str(tmp_path)).load_frozen(None)
    with pytest.raises(ConfigError, match="b3_scale: none, the config says"):
        other = recipe(bits={LAYER: 3})
        other.warm_start(jax.jit(other.init)(key(1, 0, "init")), earlier)


def test_a_vp_network_learns_in_the_units_of_its_own_prediction(base):
    vp = recipe(schedule=VPSchedule(density_power=3.0), prediction="eps", feature_weight=0.0)
    state, frozen = begun(recipe(), base)
    networks = vp.weights({"model": state.players["model"].params}, frozen)

    def both(networks, batch):
        drawn = vp.draw(networks, batch, jax.random.key(1))
        losses, _, point = vp.examine(networks, drawn, {})
        schedule, level = vp.config.schedule, drawn["level"]
        taught, _ = vp.denoiser(networks["teacher/unet"], point.x_t, level, point.condition)
        a, b = (schedule.output(v, point.x_t, level, "eps") for v in (point.v, taught))
        return losses, jnp.mean(jnp.square(a - b), axis=(1, 2, 3))

    losses, expected = jax.jit(both)(networks, BATCH)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_times_are_drawn_towards_noise():
    assert CONFIG.schedule == FlowSchedule(density="power", density_power=3.0)
    t = np.asarray(CONFIG.schedule.draw(jax.random.key(0), (20_000,)).t)
    assert t.mean() == pytest.approx(0.75, abs=0.01)
    assert (t > 0.9).mean() == pytest.approx(0.271, abs=0.01) and (t < 0.25).mean() == pytest.approx(0.016, abs=0.004)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": {"mid": 2}}, "bits: 'mid' is no layer"),
        ({"feature_taps": ("middle",)}, "feature_taps: the network has no middle; it has conv_in"),
    ],
)
def test_what_is_not_there_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_a_run_with_nothing_to_start_from_is_refused():
    with pytest.raises(ConfigError, match="no weights to quantise: set init_from"):
        recipe(init_from="").load_frozen(None)
