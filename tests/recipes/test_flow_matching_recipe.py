"""Flow matching as a recipe: what it learns, and that accumulation, meshes and stages change nothing else."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import inference_weights, train
from snapgen_jax.diffusion.path import interpolate, velocity
from snapgen_jax.diffusion.schedules import EDMSchedule, FlowSchedule, VPSchedule
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.recipes._sampling import SamplingConfig, initial_noise
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training import loop
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import GREY_TOKENS, ONE_STAGE, ByPosition, greys

CONFIG = FlowMatchingConfig(
    batch_size=16,
    train_steps=40,
    network=UNetConfig.preset("smoke", latent_channels=12, **ONE_STAGE),
    inputs=CaptionsConfig(
        image_sizes=((8, 8),),
        text=ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS),
        codec=CodecConfig(patch=2),
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    sampling=SamplingConfig(steps=3, guidance=2.0),
)


def recipe(**changes):
    return FlowMatching(dataclasses.replace(CONFIG, **changes), "cpu")


def fed(**changes):
    """The recipe with other inputs."""
    return recipe(inputs=dataclasses.replace(CONFIG.inputs, **changes))


def batch(seed=0, size=16):
    return greys(seed, size)


def one_update(made, mesh_config=None):
    state = jax.jit(made.init)(key(0, 0, "init"))
    arrays = batch()
    if mesh_config is not None:
        mesh = make_mesh(mesh_config)
        with jax.set_mesh(mesh):
            return jax.jit(make_step(made, 0))(state, {}, put_batch(arrays, mesh))
    return jax.jit(make_step(made, 0))(state, {}, arrays)


def test_it_fulfils_the_protocol():
    made = recipe()
    assert isinstance(made, Recipe) and isinstance(made.inputs, Inputs)


def test_it_learns_in_a_notebook_and_draws_what_the_caption_says():
    made = recipe()
    state = train(made, (batch(n) for n in range(1000)), steps=40, quiet=True)
    params = inference_weights(state)
    fresh = {"model": jax.jit(made.init)(key(0, 0, "init")).players["model"].params}
    loss = jax.jit(made.validation_loss)
    before, after = (
        loss(p, {}, batch(99), jax.random.key(5))["mean"].mean()
        for p in (fresh, {"model": state.players["model"].params})
    )
    assert after < 0.8 * before
    conditions = {k: jnp.asarray(v) for k, v in batch(7, 4).items() if k != "image"}
    generate = jax.jit(made.generate, static_argnums=4)
    made_images = generate(params, {}, conditions, example_keys(0, jnp.arange(4)), made.options)
    assert made_images["image"].shape == (4, 8, 8, 3) and made_images["image"].dtype == jnp.uint8


@pytest.mark.parametrize("prediction", ["velocity", "x_0"])
def test_accumulation_changes_nothing_but_rounding(prediction):
    (one, m1), (four, m4) = (
        one_update(recipe(prediction=prediction)),
        one_update(recipe(prediction=prediction, microbatches=4)),
    )
    np.testing.assert_allclose(m1["loss"], m4["loss"], rtol=1e-6)
    np.testing.assert_allclose(m1["grad_norm"], m4["grad_norm"], rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(one.players["model"].opt_state), jax.tree.leaves(four.players["model"].opt_state), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


MESHES = {
    "data parallel": MeshConfig(data=8),
    "fully sharded": MeshConfig(data=1, fsdp=8),
    "mixed": MeshConfig(data=2, fsdp=4),
    "with tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}


def losses(workdir, mesh, **changes):
    """Five updates of one run."""
    config = LoopConfig(train_steps=5, log_every_steps=1, tensorboard=False)
    state = loop.train(recipe(**changes), ByPosition("8x8", batch), config, workdir=workdir, mesh=mesh, quiet=True)
    lines = (workdir / "metrics" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], state


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("one"), make_mesh(MeshConfig(data=1), jax.devices()[:1]))[0]


@pytest.mark.parametrize(("name", "microbatches"), [*((name, 1) for name in MESHES), ("mixed", 2)])
def test_any_mesh_and_accumulation_give_the_losses_of_one_device(tmp_path, on_one_device, name, microbatches):
    mesh = MESHES[name]
    many, state = losses(tmp_path, make_mesh(mesh), microbatches=microbatches)
    np.testing.assert_allclose(many, on_one_device, rtol=1e-6)
    player = state.players["model"]
    for path, leaf in flatten(player.params).items():
        moments = [moment.sharding for moment in _moments(player.opt_state, path)]
        assert moments == [leaf.sharding] * 2, "the optimizer's moments lie where their parameter does"
    if mesh.fsdp > 1:
        sharded = [leaf for leaf in jax.tree.leaves(player.ema) if not leaf.sharding.is_fully_replicated]
        assert sum(x.size for x in sharded) > 0.8 * sum(x.size for x in jax.tree.leaves(player.ema))


def _moments(opt_state, name):
    adam = next(s for s in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    return [flatten(tree)[name] for tree in (adam.mu, adam.nu)]


def test_a_later_stage_starts_with_the_loss_of_the_earlier_one():
    made = recipe()
    state, _ = one_update(made)
    weights = inference_weights(state)
    started = made.warm_start(jax.jit(made.init)(key(9, 0, "init")), weights)
    loss = jax.jit(made.validation_loss)
    np.testing.assert_array_equal(
        loss(weights, {}, batch(), jax.random.key(1))["mean"],
        loss({"model": started.players["model"].params}, {}, batch(), jax.random.key(1))["mean"],
    )
    assert int(started.step) == 0
    assert all(not np.any(m) for m in jax.tree.leaves(started.players["model"].opt_state))


def test_captions_are_dropped_at_the_given_rate():
    made = fed(caption_dropout=0.25)
    big = batch(0, 4096)
    drawn = jax.jit(made.draw)({}, big, jax.random.key(0))
    told = drawn["condition"]
    dropped = np.asarray(told["tokens"][:, 1] == 2)
    np.testing.assert_array_equal(dropped, ~drawn["kept"]["text"])
    assert abs(dropped.mean() - 0.25) < 0.03
    np.testing.assert_array_equal(told["mask"][dropped].sum(axis=1), 2)
    np.testing.assert_array_equal(told["tokens"][~dropped], big["tokens"][~dropped])


def test_an_image_depends_on_its_own_key_alone():
    keys = example_keys(0, jnp.asarray([5, 6, 7]))
    np.testing.assert_array_equal(initial_noise(keys, (4, 4, 12))[1], initial_noise(keys[1:2], (4, 4, 12))[0])


@pytest.mark.parametrize(
    ("method", "wrong", "right"),
    [("euler", (2, 3, 4, 4, 12), (2, 4, 4, 12)), ("renoise", (2, 4, 4, 12), (2, 3, 4, 4, 12))],
)
def test_given_noise_of_another_shape_is_refused(method, wrong, right):
    made = recipe()
    weights = jax.eval_shape(made.init, key(0, 0, "init")).players["model"].params
    tokens = {name: batch()[name][:2] for name in ("tokens", "mask")}

    def generate(shape):
        conditions = {**tokens, "noise": jnp.zeros(shape)}
        keys = example_keys(0, jnp.arange(2))
        options = dataclasses.replace(made.options, method=method)
        return jax.eval_shape(lambda p: made.generate({"model": p}, {}, conditions, keys, options), weights)

    assert generate(right)["image"].shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match=rf"the noise is {re.escape(str(wrong))}; .* take {re.escape(str(right))}"):
        generate(wrong)


def test_times_below_the_bound_count_by_the_square_of_the_time():
    made, bounded = recipe(prediction="x_0"), recipe(prediction="x_0", loss_full_from=0.5)
    networks = made.current(jax.jit(made.init)(key(0, 0, "init")), {})
    drawn = made.draw(networks, batch(), jax.random.key(0))

    def losses(recipe, t):
        level = FlowSchedule().level(jnp.full(16, t))
        return float(jax.jit(recipe.loss)(networks, {**drawn, "level": level}, {})[0])

    assert losses(bounded, 0.7) == pytest.approx(losses(made, 0.7), rel=1e-6)
    assert losses(bounded, 0.2) == pytest.approx(losses(made, 0.2) * (0.2 / 0.5) ** 2, rel=1e-5)


def test_a_codec_that_does_not_fit_the_network_is_refused():
    with pytest.raises(ValueError, match=r"the inputs give 48 latent channels and network.latent_channels is 12"):
        fed(codec=CodecConfig(patch=4))


def test_guidance_that_no_step_would_ask_for_is_refused_before_the_training():
    with pytest.raises(ValueError, match=r"sampling: guidance_interval=\(0.8, 0.9\) holds none of the times"):
        recipe(sampling=SamplingConfig(steps=3, guidance_interval=(0.8, 0.9)))
    recipe(sampling=SamplingConfig(steps=3, guidance=1.0, guidance_interval=(0.8, 0.9)))  # there is no guidance
    with pytest.raises(ValueError, match="t_low <= t_high"):
        SamplingConfig(guidance_interval=(0.9, 0.8))


def test_sampling_that_the_schedule_does_not_have_is_refused_before_the_training():
    with pytest.raises(ValueError, match=r"sampling: shift = 3\.0: a schedule of kind 'vp' has none"):
        recipe(schedule=VPSchedule(), prediction="eps", sampling=SamplingConfig(shift=3.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: {"unet": model["unet"]}, r"text/.*: none, the config says \["),
        (lambda model: jax.tree.map(lambda x: x[..., :1], model), r"text/.*: \[.*1\], the config says \["),
        (None, r"text/.*: none, the config says"),
    ],
)
def test_an_earlier_stage_of_another_network_is_refused_with_what_differs(change, message):
    made = recipe()
    state = jax.eval_shape(made.init, key(0, 0, "init"))
    drawn = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), state.players["model"].params)
    earlier = {"discriminator": {}} if change is None else {"model": change(drawn)}
    with pytest.raises(ConfigError, match=f"the run that init_from names holds another network.*\n(.*\n)*.*{message}"):
        jax.eval_shape(made.warm_start, state, earlier)


def test_what_an_earlier_stage_trained_and_this_one_leaves_behind_is_named_by_the_first_process(caplog, monkeypatch):
    made = recipe()
    state = jax.eval_shape(made.init, key(0, 0, "init"))
    model = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), state.players["model"].params)
    richer = {**model, "conditioner": {"linear": {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}}}
    jax.eval_shape(made.warm_start, state, {"model": model})
    assert not caplog.records
    jax.eval_shape(made.warm_start, state, {"model": richer})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the earlier stage also trained conditioner (16 parameters)" in record.getMessage()
    assert "set `inputs` as in that run's config.json to keep it" in record.getMessage()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    jax.eval_shape(made.warm_start, state, {"model": richer})
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("sampling", "dropout", "warns"),
    [
        ({"method": "renoise", "guidance": 1.0}, 0.1, True),
        ({"method": "renoise", "guidance": 1.0}, 0.0, False),
        ({"method": "euler", "guidance": 1.0}, 0.1, False),
    ],
)
def test_conditions_that_are_dropped_for_no_guidance_are_warned_of(sampling, dropout, warns, caplog):
    inputs = dataclasses.replace(CONFIG.inputs, caption_dropout=dropout)
    recipe(inputs=inputs, sampling=SamplingConfig(steps=3, **sampling))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    assert all("0.1 of the examples are trained without a condition" in line and "to 0" in line for line in said)


def test_platform_choices_are_fixed_by_the_platform_compiled_for():
    cpu, tpu = (FlowMatching(CONFIG, platform).networks()["unet"].config for platform in ("cpu", "tpu"))
    assert cpu.dtype == "float32" and cpu.depthwise == "shifted"
    assert tpu.dtype == "bfloat16" and tpu.depthwise == "grouped"


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(VPSchedule.preset("sd15"), "eps"), (VPSchedule.preset("zero_snr"), "v"), (EDMSchedule.preset("edm"), "F")],
)
def test_a_network_under_another_schedule_trains_on_its_native_loss_and_draws_by_the_same_sampler(schedule, prediction):
    made = recipe(schedule=schedule, prediction=prediction, sampling=SamplingConfig(steps=4, guidance=1.0))
    state = jax.jit(made.init)(key(0, 0, "init"))
    networks = made.current(state, {})
    drawn = jax.jit(made.draw)(networks, batch(), jax.random.key(1), 0)
    loss, _ = jax.jit(made.loss)(networks, drawn, {})
    # A fresh network gives zeros, so that its native loss is the mean square of what it should have given.
    level = drawn["level"]
    x_t = interpolate(drawn["x_0"], drawn["eps"], level.t)
    native = schedule.output(velocity(drawn["x_0"], drawn["eps"]), x_t, level, prediction)
    np.testing.assert_allclose(loss, jnp.mean(jnp.square(native)), rtol=1e-3)
    _, metrics = jax.jit(make_step(made, 0))(state, {}, batch())
    assert bool(metrics["finite"])
    conditions = {name: batch()[name][:2] for name in made.conditions()}
    out = jax.jit(lambda p: made.generate(p, {}, conditions, jax.random.split(jax.random.key(0), 2), made.options))(
        {"model": state.players["model"].params}
    )
    assert np.isfinite(out["latent"]).all() and out["image"].shape == (2, 8, 8, 3)
