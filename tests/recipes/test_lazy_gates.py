"""LazyDiT: gates learn when a module's last output may be used again, and what they skip does not run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.dit import DiTConfig, SelfAttention
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.mmdit_blocks import FeedForward
from snapgen_jax.networks.module import build
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.taps import Blend
from snapgen_jax.recipes._gates import gated_modules, threshold
from snapgen_jax.recipes._sampling import sampling_grid
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.recipes.lazy_gates import LazyGates, LazyGatesConfig, LazySamplingConfig, majority_schedule
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import random_like

STEPS, MODULES = 4, 4  # two blocks of two modules
CONFIG = LazyGatesConfig(
    batch_size=8,
    train_steps=60,
    network=DiTConfig.preset("smoke", latent_channels=12, patch=1, sigma="none"),
    inputs=ClassLabelsConfig(
        image_sizes=((8, 8),), codec=CodecConfig(patch=2), label=LabelEmbeddingConfig(classes=4, width=16)
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.0),
    sampling=LazySamplingConfig(steps=STEPS, guidance=2.0),
)


def lazy(**changes):
    return LazyGates(dataclasses.replace(CONFIG, **changes), "cpu")


RECIPE = lazy()
FROZEN = random_like(RECIPE.frozen_spec(), 1)
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8),
    "label": np.arange(8, dtype=np.int32) % 4,
}


def fresh(recipe=RECIPE):
    return {"model": jax.jit(recipe.init)(key(0, 0, "init")).players["model"].params}


@pytest.fixture(scope="module")
def undecided():
    """Gates that run about half of the modules, other ones for each example."""
    generator = np.random.default_rng(3)
    gates = {
        name: {"kernel": jnp.asarray(generator.normal(size=gate["kernel"].shape), jnp.float32), "mean": gate["mean"]}
        for name, gate in fresh()["model"]["gates"].items()
    }
    return {"model": {"gates": gates}}


@functools.cache
def program(**options):
    chosen = dataclasses.replace(RECIPE.options, **options)

    def generate(params, labels, indices):
        return RECIPE.generate(params, FROZEN, {"label": labels}, example_keys(jnp.uint32(7), indices), chosen)

    return jax.jit(generate)


def draw(params, rows, **options):
    """What the recipe draws for these rows of the batch."""
    rows = np.asarray(rows)
    return jax.device_get(program(**options)(params, BATCH["label"][rows], rows.astype(np.uint32)))


def assert_near(drawn, expected):
    """Two programs of the same arithmetic."""
    assert np.linalg.norm(drawn - expected) <= 1e-5 * np.linalg.norm(expected)


def test_it_fulfils_the_protocol_and_trains_gates_alone():
    assert isinstance(RECIPE, Recipe) and isinstance(RECIPE.inputs, Inputs)
    assert RECIPE.trains == {"model": ("gates",)} and set(FROZEN) == {"dit", "label"}
    assert RECIPE.weights(fresh(), FROZEN).keys() == {"gates", "dit", "label"}
    kernels = [gate["kernel"] for gate in fresh()["model"]["gates"].values()]
    assert sum(kernel.size for kernel in kernels) == MODULES * STEPS * CONFIG.network.width
    assert not any(kernel.any() for kernel in kernels)


@pytest.mark.parametrize("options", [{}, {"lazy": 0.25}, {"lazy": 0.0}])
def test_fresh_gates_draw_what_the_network_draws_without_them(options):
    names = {field.name for field in dataclasses.fields(FlowMatchingConfig)}
    method = FlowMatching(FlowMatchingConfig(**{name: getattr(CONFIG, name) for name in names}), "cpu")
    keys = example_keys(jnp.uint32(7), jnp.arange(2, dtype=jnp.uint32))
    plain = dataclasses.replace(RECIPE.options, lazy=0.0)
    run = jax.jit(lambda: method.generate({"model": {}}, FROZEN, {"label": BATCH["label"][:2]}, keys, plain))
    drawn = draw(fresh(), [0, 1], **options)
    assert_near(drawn["latent"], run()["latent"])
    assert ("ran" in drawn) == (options.get("lazy") != 0)
    assert drawn.get("ran", np.array(True)).all()


def test_training_with_fresh_gates_blends_halves_of_a_module_and_of_its_last_output():
    networks = RECIPE.weights(fresh(), FROZEN)
    drawn = jax.jit(lambda: RECIPE.draw(networks, BATCH, key(0, 0, "update")))()
    rolled = RECIPE._roll_out(networks, drawn)
    x_t, level, condition, outputs, _ = rolled
    ones = {module: Blend(value, jnp.float32(0.5)) for module, value in outputs.items()}
    expected, _ = RECIPE.denoiser(networks["dit"], x_t, level, condition, reuse=ones)
    v, _ = RECIPE._gated(networks, drawn["step"], rolled, Blend, jax.nn.sigmoid)
    np.testing.assert_array_equal(v, expected)
    full, _ = RECIPE.denoiser(networks["dit"], x_t, level, condition)
    assert np.abs(v - full).max() > 1e-3 * np.abs(full).max()  # the last outputs are others


def test_every_other_step_runs_whole_and_what_runs_depends_on_the_example(undecided):
    ran = draw(undecided, range(4))["ran"]
    assert ran.shape == (4, 2, STEPS, MODULES)
    assert ran[:, :, ::2].all() and not ran[:, :, 1::2].all()
    np.testing.assert_array_equal(ran[:, 0], ran[:, 1])  # both halves decide together
    apart = draw(undecided, range(4), halves="separate")["ran"]
    assert (apart[:, 0] != apart[:, 1]).any() and (apart != apart[:1]).any()
    assert apart.mean() < ran.mean()


@pytest.mark.parametrize("halves", ["joint", "separate"])
def test_an_example_is_drawn_alike_alone_and_beside_others(undecided, halves):
    together = draw(undecided, range(4), halves=halves)
    assert (together["ran"] != together["ran"][:1]).any()
    for row in (0, 3):
        alone = draw(undecided, [row], halves=halves)
        np.testing.assert_array_equal(alone["ran"][0], together["ran"][row])
        assert_near(alone["latent"][0], together["latent"][row])


def test_a_second_draw_finds_no_output_of_the_first(undecided):
    first, second = (draw(undecided, [2], halves="joint")["latent"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - draw(fresh(), [2])["latent"]).max() > 1e-3  # skipping is seen


def counted(monkeypatch, params, rows, options):
    """How many modules run while drawing, and what the gates say ran."""
    calls = []

    def counts(module):
        run = module.__call__

        def call(self, x):
            jax.debug.callback(lambda: calls.append(module.__name__))
            return run(self, x)

        monkeypatch.setattr(module, "__call__", call)

    counts(SelfAttention)
    counts(FeedForward)
    chosen = dataclasses.replace(RECIPE.options, **options)
    keys = example_keys(jnp.uint32(7), jnp.asarray(rows, jnp.uint32))
    drawn = jax.jit(lambda p, c: RECIPE.generate(p, FROZEN, c, keys, chosen))(params, {"label": BATCH["label"][rows]})
    jax.block_until_ready(drawn)
    jax.effects_barrier()
    monkeypatch.undo()
    return len(calls), np.asarray(drawn["ran"])


def test_what_is_skipped_does_not_run(undecided, monkeypatch):
    calls, ran = counted(monkeypatch, undecided, [0], {})
    assert calls == ran[0, 0].sum() < STEPS * MODULES
    calls, ran = counted(monkeypatch, undecided, [0, 1, 2], {"halves": "separate"})
    assert calls == ran.any(axis=(0, 1)).sum()  # of several examples, what any of them runs
    schedule = "1111,0110,1111,0000"
    calls, ran = counted(monkeypatch, undecided, [0, 1, 2], {"schedule": schedule})
    assert calls == 10 and majority_schedule(ran) == schedule


def test_the_schedule_of_one_sample_draws_that_sample(undecided):
    drawn = draw(undecided, [1])
    schedule = majority_schedule(drawn["ran"])
    assert "0" in schedule
    assert_near(draw(undecided, [1], schedule=schedule)["latent"], drawn["latent"])


def test_a_wanted_share_is_that_of_the_lowest_means():
    means = np.random.default_rng(0).normal(size=(STEPS, MODULES)).astype(np.float32)
    gates = {str(m): {"kernel": jnp.zeros((STEPS, 2)), "mean": means[:, m]} for m in range(MODULES)}
    names, odd = tuple(gates), np.arange(STEPS) % 2 == 1
    for share, count in ((0.0, 0), (0.25, 4), (0.3, 5), (0.5, 8)):
        assert (means[odd] < threshold(gates, names, odd, share)).sum() == count
    assert threshold(gates, names, odd, None) == 0
    with pytest.raises(ValueError, match=r"lazy=0.6: of these 4 steps 2 may skip, at most 0.5 of the module calls"):
        threshold(gates, names, odd, 0.6)
    assert (means[1:] < threshold(gates, names, np.arange(STEPS) > 0, 0.75)).all()


@functools.cache
def trained(rho, refresh="odd_steps"):
    """The gates after sixty updates, the last metrics, and the validation numbers."""
    recipe = lazy(rho_attention=rho, rho_ffn=rho, refresh=refresh)
    state, step = jax.jit(recipe.init)(key(0, 0, "init")), jax.jit(make_step(recipe, 0))
    for _ in range(60 if refresh == "odd_steps" else 12):
        state, metrics = step(state, FROZEN, BATCH)
    params = {"model": state.players["model"].params}
    numbers = jax.jit(recipe.validation_loss)(params, FROZEN, BATCH, jax.random.key(0))
    return params, metrics, jax.tree.map(lambda x: float(jnp.mean(x)), numbers)


def test_the_similarity_of_outputs_is_that_of_two_steps_of_the_sampler():
    found = jax.jit(lambda: RECIPE.similarity(fresh(), FROZEN, BATCH, key(0, 0, "evaluation")))()
    assert list(found)[:2] == ["block_00_attention/step=01", "block_00_attention/step=02"]
    assert len(found) == MODULES * (STEPS - 1) and all(x.shape == (8,) for x in found.values())
    networks = RECIPE.weights(fresh(), FROZEN)
    told = RECIPE.inputs.draw_condition(networks, BATCH, key(0, 0, "evaluation"), {})
    condition = RECIPE.inputs.condition(networks, told)
    grid = sampling_grid(RECIPE.config.schedule, RECIPE.options)
    x = jax.random.normal(key(0, 0, "evaluation"), (8, 4, 4, 12))
    outputs = []
    for i in range(2):
        v, taps = RECIPE.denoiser(networks["dit"], x, grid.at(jnp.int32(i), 8), condition, taps=["block_01_ffn"])
        outputs.append(np.asarray(taps["block_01_ffn"]).reshape(8, -1))
        x = x + (grid.t[i + 1] - grid.t[i]) * v
    norms = np.linalg.norm(outputs[0], axis=1) * np.linalg.norm(outputs[1], axis=1)
    np.testing.assert_allclose(found["block_01_ffn/step=01"], (outputs[0] * outputs[1]).sum(1) / norms, rtol=1e-4)


def test_a_higher_price_skips_more_and_costs_more():
    numbers = [trained(rho)[2] for rho in (0.0, 0.03, 10.0)]
    skipped, errors = ([n[name] for n in numbers] for name in ("skipped", "mean"))
    assert skipped == sorted(skipped) and errors == sorted(errors)
    assert skipped[0] < 0.1 and skipped[2] == 1.0  # of the steps that may skip
    assert set(numbers[0]) == {"mean", "skipped", "step=1", "step=3"}


def test_gates_of_steps_that_refresh_stay_zero():
    gates = trained(10.0)[0]["model"]["gates"]
    for gate in gates.values():
        assert not gate["kernel"][::2].any() and gate["kernel"][1::2].any(axis=1).all()
        assert not gate["mean"][::2].any() and (gate["mean"][1::2] < 0).all()
    every = trained(10.0, refresh="first_step")[0]["model"]["gates"]
    assert all(gate["kernel"][2].any() and not gate["kernel"][0].any() for gate in every.values())


def test_at_the_ceiling_half_of_all_calls_are_skipped_for_everybody():
    drawn = draw(trained(10.0)[0], [0, 1])
    assert drawn["ran"].mean() == 0.5
    schedule = "1111,0000,1111,0000"
    assert_near(draw(trained(10.0)[0], [0, 1], schedule=schedule)["latent"], drawn["latent"])


def test_the_network_of_another_run_is_read_and_is_not_saved(tmp_path):
    method = FlowMatching(
        FlowMatchingConfig(batch_size=8, network=CONFIG.network, inputs=CONFIG.inputs, prediction=CONFIG.prediction),
        "cpu",
    )
    state = jax.jit(method.init)(key(0, 0, "init"))
    checkpointer = Checkpointer(epath.Path(tmp_path))
    checkpointer.save(state, 0, {})
    checkpointer.close()
    recipe = lazy(base=str(tmp_path))
    frozen = recipe.load_frozen(None)
    assert fingerprint(frozen) == fingerprint(state.players["model"].ema)
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(lambda spec: spec.shape, recipe.frozen_spec())
    held = jax.jit(recipe.init)(key(0, 0, "init")).players["model"]
    assert set(held.params) == {"gates"} and held.ema is None
    with pytest.raises(ConfigError, match="set base to a trained run"):
        RECIPE.load_frozen(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 6}, "steps=6, and the gates were trained for 4"),
        ({"lazy": 0.7}, "lazy=0.7: of these 4 steps 2 may skip"),
        ({"schedule": "111,111,111,111"}, "give 4 digits 1 .runs. or 0 .reused. for each step"),
    ],
)
def test_options_that_do_not_fit_the_gates_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        program(**options)(fresh(), BATCH["label"][:1], np.zeros(1, np.uint32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "heun"}, "method='heun' skips no module; set method='euler', or lazy=0"),
        ({"steps": 3, "schedule": "11,10"}, "schedule='11,10' is of 2 steps and steps=3; make them equal"),
        ({"steps": 2, "schedule": "11,1x"}, "give as many digits 1 .runs. or 0 .reused. for each step"),
        ({"steps": 2, "schedule": "11,1"}, "give as many digits"),
        ({"steps": 2, "schedule": "10,11"}, "the first step has nothing to use again"),
        ({"steps": 2, "schedule": "11,10", "lazy": 0.2}, "lazy=0.2 beside a schedule"),
        ({"lazy": 1.5}, "lazy"),
    ],
)
def test_sampling_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LazySamplingConfig(**options)


def test_what_has_no_place_for_a_gate_is_refused():
    with pytest.raises(ValueError, match=r"network.kind='sd_unet' does not name what enters its modules"):
        gated_modules(build(SDUNetConfig.preset("smoke"))[0])
    with pytest.raises(ValueError, match=r"network.kind='dit' has no residual modules, only attention, ffn"):
        lazy(gate=("residual", "ffn"))
    with pytest.raises(ValueError, match=r"gate=\(\) leaves nothing to skip"):
        lazy(gate=())
    with pytest.raises(ValueError, match="one step has no step before it"):
        dataclasses.replace(CONFIG, sampling=LazySamplingConfig(steps=1))
