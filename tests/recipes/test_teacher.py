"""A teacher: what it is asked, what it is fed, where its weights come from, and what of it is refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.diffusion.path import interpolate
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.schedules import FlowSchedule, VPSchedule
from snapgen_jax.experiment import Experiment
from snapgen_jax.inputs.stored import StoredConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.counting import count_macs
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import apply, count_parameters, init
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.systems.sd35 import reference_times
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import greys, random_like, state_away_from_zero, train_and_read
from tests.students_for_tests import CAPTIONS, GREYS, MMDIT, STUDENT, TEACHER

CONFIG = DistillationConfig(**STUDENT, teacher=TEACHER, student_taps=("block_00",), teacher_taps=("block_01",))
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PODS = (
    "distill/t2i_512_sd35l",
    "distill/t2i_1024_sd35l",
    "fewstep/t2i_1024_4step",
    "fewstep/t2i_1024_8step",
    "fewstep/t2i_1024_4step_kdmd",
)
SD15 = VPSchedule.preset("sd15")


def recipe(teacher=TEACHER, **changes):
    return Distillation(dataclasses.replace(CONFIG, teacher=teacher, **changes), "cpu")


def teacher(**changes):
    return dataclasses.replace(TEACHER, **changes)


def from_config(name, *overrides, arg=""):
    return load_experiment(f"{CONFIGS / name}.py{arg}", overrides).build("cpu")


@pytest.fixture(scope="module")
def taught():
    """A recipe, its networks by role, drawn examples, and what the student attends to."""
    made = recipe()
    networks = made.current(state_away_from_zero(made), random_like(made.frozen_spec()))
    drawn = jax.jit(made.draw)(networks, greys(), jax.random.key(3), 0)
    return made, networks, drawn, jax.jit(made.inputs.condition)(networks, drawn["condition"])


def ask(made, networks, drawn, x_t, level, condition):
    return jax.jit(lambda *args: made.teacher.ask(*args)[0])(networks, drawn["teacher"], x_t, level, condition)


# --- its velocity ---


def test_it_is_asked_once_for_velocity_and_features(taught):
    made, networks, drawn, condition = taught

    def work(*taps):
        def both(*args):
            return made.teacher.ask(*args, taps)

        return count_macs(both, networks, drawn["teacher"], drawn["eps"], drawn["level"], condition)

    assert work("block_00", "block_01") == work() > 0


def test_guided_it_is_followed_beyond_the_conditional_velocity(taught):
    made, networks, drawn, condition = taught
    guided = recipe(teacher(guidance=3.0))
    null = jax.tree.map(lambda e, c: jnp.broadcast_to(e, c.shape), made.inputs.null_condition(networks), condition)
    eps, level = drawn["eps"], drawn["level"]
    v, v_null = (ask(made, networks, drawn, eps, level, c) for c in (condition, null))
    w = ask(guided, networks, drawn, eps, level, condition)
    np.testing.assert_allclose(w, v_null + 3 * (v - v_null), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(w - v).max()) > 1e-3


def test_a_rollout_leads_where_its_own_sampler_does(taught):
    made, networks, drawn, condition = taught
    eps, schedule = drawn["eps"], FlowSchedule()

    def denoise(x, t, i, carry):
        return made.teacher.ask(networks, drawn["teacher"], x, schedule.level(t), condition)[0], carry

    end, _ = jax.jit(lambda eps: sample(denoise, eps, jnp.linspace(1.0, 0.0, 5)))(eps)
    rolled = recipe(teacher(rollout_steps=4))
    v = ask(rolled, networks, drawn, eps, schedule.level(jnp.ones(8)), condition)
    np.testing.assert_allclose(eps - v, end, rtol=1e-4, atol=1e-4)
    for t in (0.01, 0.0):  # a short way, along which the velocity hardly changes
        near = schedule.level(jnp.full(8, t))
        v, one = (ask(who, networks, drawn, drawn["x_0"], near, condition) for who in (rolled, made))
        assert jnp.linalg.norm(v - one) < 0.15 * jnp.linalg.norm(one), t


def by_hand(made, networks, x_t, n, condition):
    """The velocity of a network that predicts the noise after n steps of Stable Diffusion 1.5, from its betas."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha, sigma = (float(np.sqrt(x)) for x in (np.cumprod(1 - betas)[n], 1 - np.cumprod(1 - betas)[n]))
    z = (alpha + sigma) * x_t
    features = time_features(jnp.full(len(x_t), float(n)), MMDIT.time_width, 1.0)
    network = made.teacher.denoiser.network
    eps, _ = jax.jit(lambda *args: apply(network, *args))(networks["teacher/mmdit"], z, features, condition)
    return eps - (z - sigma * eps) / alpha, sigma / (alpha + sigma)


def test_under_a_vp_schedule_it_gives_the_velocity_at_the_students_point(taught):
    _, networks, drawn, condition = taught
    made = recipe(teacher(schedule=SD15, prediction="eps"))
    x_t = interpolate(drawn["x_0"], drawn["eps"], drawn["level"].t)
    assert np.isfinite(ask(made, networks, drawn, x_t, drawn["level"], condition)).all()
    for t, x in ((0.0, drawn["x_0"]), (1.0, drawn["eps"])):
        assert np.isfinite(ask(made, networks, drawn, x, FlowSchedule().level(jnp.full(8, t)), condition)).all()
    for n in (100, 500, 900):
        expected, t = by_hand(made, networks, x_t, n, condition)
        v = ask(made, networks, drawn, x_t, FlowSchedule().level(jnp.full(8, t)), condition)
        np.testing.assert_allclose(v, expected, rtol=1e-3, atol=1e-3 * float(jnp.abs(expected).max()))


def test_a_student_under_a_vp_schedule_learns_from_either(taught):
    flow, networks, drawn, condition = taught
    x_t, level = drawn["eps"], SD15.at_step(jnp.full(8, 500))
    under = {"schedule": SD15, "prediction": "eps"}
    v = ask(recipe(**under), networks, drawn, x_t, level, condition)
    expected = ask(flow, networks, drawn, x_t, FlowSchedule().level(level.t), condition)
    np.testing.assert_allclose(v, expected, rtol=1e-5, atol=1e-5)
    same = recipe(teacher(**under), **under)
    v = ask(same, networks, drawn, x_t, level, condition)
    expected, _ = by_hand(same, networks, x_t, 500, condition)
    np.testing.assert_allclose(v, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    _, metrics = jax.jit(make_step(same, 0))(state_away_from_zero(same), random_like(same.frozen_spec()), greys())
    assert bool(metrics["finite"]) and float(metrics["loss/output"]) > 0


# --- what it is fed ---


def test_with_other_latents_it_teaches_features_from_the_same_image_with_noise_of_its_own():
    other = teacher(
        network=dataclasses.replace(MMDIT, latent_channels=48),
        inputs=dataclasses.replace(CAPTIONS, codec=CodecConfig(patch=4)),
        takes=("latent",),
    )
    made = recipe(other, output_weight=0.0)
    assert set(made.frozen_spec()) == {"teacher/mmdit"}
    frozen = random_like(made.frozen_spec())
    drawn = jax.jit(made.draw)(frozen, greys(), jax.random.key(0), 0)
    own, t = drawn["teacher"], drawn["level"].t
    assert own["x_0"].shape == (8, 2, 2, 48) and drawn["x_0"].shape == (8, 4, 4, 12)
    of_the_times = np.log(t) - np.log1p(-t)  # of one key its beginning would be these numbers
    assert not np.isclose(of_the_times[:, None], np.ravel(own["eps"]), rtol=0, atol=1e-6).any()
    _, metrics = jax.jit(make_step(made, 0))(state_away_from_zero(made), frozen, greys())
    assert bool(metrics["finite"]) and float(metrics["loss/feature"]) > 0
    with pytest.raises(ValueError, match="output_weight=0"):
        recipe(other)


def test_with_a_text_encoder_of_its_run_the_tokenizer_of_that_run_is_used():
    made = recipe(teacher(workdir="runs/teacher", inputs=CAPTIONS))
    assert made.inputs.tokenizers()["tokens"].workdir == ""
    assert {name: spec.workdir for name, spec in made.tokenizers().items()} == {"tokens": "runs/teacher"}
    assert set(made.frozen_spec()) == {"teacher/mmdit", "teacher/text"}
    elsewhere = recipe(teacher(workdir="runs/teacher", inputs=dataclasses.replace(CAPTIONS, text_workdir="runs/clip")))
    assert elsewhere.tokenizers()["tokens"].workdir == "runs/clip", "its text encoder comes from there"
    own_codec = teacher(workdir="runs/teacher", inputs=CAPTIONS, takes=("latent",))
    assert recipe(own_codec, output_weight=0.0).tokenizers()["tokens"].workdir == "", "its text is the student's"


def test_with_a_text_encoder_of_its_own_it_attends_to_what_that_makes_of_the_same_caption(taught):
    _, networks, _, condition = taught
    made = recipe(teacher(inputs=CAPTIONS))
    networks = {**networks, "teacher/text": random_like(made.frozen_spec()["teacher/text"], 5)}
    drawn = jax.jit(made.draw)(networks, greys(), jax.random.key(3), 0)
    jax.tree.map(np.testing.assert_array_equal, drawn["teacher"]["condition"], drawn["condition"])
    own = jax.jit(made.teacher.condition)(networks, drawn["teacher"], condition)
    as_student = {**networks, "text": networks["teacher/text"]}
    expected = jax.jit(made.inputs.condition)(as_student, drawn["condition"])
    jax.tree.map(np.testing.assert_array_equal, own, expected)
    assert float(jnp.abs(own.pooled - condition.pooled).max()) > 1e-3


def test_stored_states_are_read_beside_a_student_of_captions_and_dropped_in_the_same_rows():
    states = StoredConfig(
        latent_channels=0, context_tokens=5, context_width=16, pooled_width=16, prefix="teacher_", caption_dropout=0.0
    )
    made = recipe(teacher(inputs=states), batch_size=400, inputs=dataclasses.replace(CAPTIONS, caption_dropout=0.5))
    (specs,) = made.batch_specs().values()
    assert set(specs) == {"image", "tokens", "mask", "teacher_sequence", "teacher_mask", "teacher_pooled"}
    assert set(made.conditions()) == {"tokens", "mask"}, "it is not asked for a picture"
    batch = {**greys(size=400), **{n: jnp.ones(s.shape, s.dtype) for n, s in specs.items() if "teacher" in n}}
    drawn = jax.jit(made.draw)({}, batch, jax.random.key(0), 0)
    student = np.asarray(drawn["condition"]["tokens"] == batch["tokens"]).all(axis=1)
    np.testing.assert_array_equal(student, np.asarray(drawn["teacher"]["condition"]["mask"]).any(axis=1))
    assert 0.4 < student.mean() < 0.6


def test_a_dropped_caption_is_dropped_for_it_too():
    made = from_config("distill/t2i_512_sd35l", "batch_size=400", "inputs.caption_dropout=0.5", arg=":runlocal")
    (specs,) = made.batch_specs().values()
    batch = {name: jnp.ones(s.shape, s.dtype) for name, s in specs.items()}
    drawn = jax.jit(made.draw)({}, batch, jax.random.key(0))
    conditioner = {"conditioner": init(made.networks()["conditioner"], jax.random.key(1))}
    student, own = jax.jit(made.inputs.condition)(conditioner, drawn["condition"]), drawn["teacher"]["condition"]
    kept = np.asarray(student.mask).any(axis=1)
    assert 0.4 < kept.mean() < 0.6
    assert not np.asarray(student.sequence)[~kept].any() and not np.asarray(student.pooled)[~kept].any()
    for name in ("sequence", "mask", "pooled"):
        rows = np.asarray(own[name], np.float32)
        assert (rows[kept] == 1).all() and not rows[~kept].any(), name
    partly = kept & ~np.asarray(drawn["kept"]["language"], bool)
    assert partly.any(), "the teacher reads the whole caption where the student keeps some of its encoders"
    context = made.teacher.condition({}, drawn["teacher"], None)
    assert isinstance(context, TextContext) and context.sequence.shape == (400, 12, 16)


OWN_LATENTS = ("teacher.takes=('condition','latent')", "teacher.inputs.reduction=1")


def test_with_stored_latents_of_its_own_it_teaches_features_alone():
    channels = ("teacher.inputs.latent_channels=3", "teacher.network.latent_channels=3")
    own = (*OWN_LATENTS, *channels, "teacher.network.position_size=64")
    with pytest.raises(ValueError, match="output_weight=0"):
        from_config("distill/t2i_512_sd35l", *own, arg=":runlocal")
    made = from_config("distill/t2i_512_sd35l", *own, "output_weight=0.0", arg=":runlocal")
    (specs,) = made.batch_specs().values()
    assert specs["teacher_latent"].shape == (8, 64, 64, 3)


def test_what_made_its_stored_latents_and_text_states_is_not_loaded():
    channels = ("teacher.inputs.latent_channels=4", "teacher.network.latent_channels=4")
    own = (OWN_LATENTS[0], *channels, "output_weight=0.0")
    made = from_config("distill/t2i_512_sd35l", *own, arg=":runlocal")
    assert set(made.frozen_spec()) == {"teacher/mmdit"} == set(made.load_frozen(None))


# --- where its weights come from ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": MMDiTConfig.preset("smoke")}, r"12 channels and teacher\.network\.latent_channels is 4"),
        ({"weights": "b", "inputs": CAPTIONS}, r"holds an MMDiT alone, and no text; let teacher\.inputs name a run"),
        ({"weights": "b", "network": UNetConfig.preset("smoke", latent_channels=12)}, "to 'mmdit'"),
        ({"rollout_steps": 0}, "rollout_steps is 0; give 1 or more"),
        ({"workdir": "a", "weights": "b"}, "one of them"),
        ({"takes": ("latent",)}, r"no teacher\.inputs to take them from"),
        ({"prediction": "F"}, "cannot predict 'F'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(given, message):
    with pytest.raises(ValueError, match=message):
        recipe(teacher(**given))


def test_without_one_to_load_it_says_which_key_to_set():
    with pytest.raises(ConfigError, match=r"teacher\.workdir"):
        recipe().load_frozen(None)


@pytest.mark.parametrize(
    ("run", "inputs", "tokenizer", "message"),
    [
        ({}, {}, "a", "is no trained run"),  # fits, but has no checkpoint here
        ({"prediction": "x_0"}, {}, "a", r"has prediction='x_0', and teacher\.prediction is 'velocity'; set it"),
        ({"schedule": {"kind": "vp"}}, {}, "a", r"has schedule\.kind='vp', and teacher\.schedule\.kind is 'flow'"),
        ({"recipe": "step_distillation"}, {}, "a", "its own sampling alone.*to the run that it was distilled from"),
        ({}, {"codec": CodecConfig(patch=2, scale=9.0)}, "a", r"has the latents .*teacher\.inputs"),
        ({}, {"codec": CodecConfig("identity")}, "a", "has the latents"),
        (
            {},
            {"text_workdir": ""},
            "a",
            r"of its own; set inputs\.text_workdir to it, or give teacher\.inputs",
        ),
        ({}, {}, "b", r"set inputs\.text_workdir to the same"),
    ],
)
def test_a_run_that_is_not_what_the_config_says_is_refused(tmp_path, run, inputs, tokenizer, message):
    fits = dataclasses.replace(CAPTIONS, text_workdir="moved/since")
    for name, tokens in (("teacher", "a"), ("clip", tokenizer)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(tokens)
    section = dataclasses.asdict(dataclasses.replace(fits, **inputs))
    config = {"prediction": "velocity", "inputs": section, **run}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    student = dataclasses.replace(CAPTIONS, text_workdir=str(tmp_path / "clip"))
    made = recipe(teacher(workdir=str(tmp_path / "teacher")), inputs=student)
    with pytest.raises(ConfigError, match=message):
        made.load_frozen(None)


def test_a_text_encoder_of_its_own_must_know_the_students_tokenizer(tmp_path):
    for name, tokens in (("teacher", "a"), ("clip", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(tokens)
    student = dataclasses.replace(CAPTIONS, text_workdir=str(tmp_path / "clip"))
    made = recipe(teacher(workdir=str(tmp_path / "teacher"), inputs=CAPTIONS), inputs=student)
    with pytest.raises(ConfigError, match="both read 'tokens'; use text encoders that were trained with one tokenizer"):
        made.load_frozen(None)
    (tmp_path / "clip" / "tokenizer.json").write_text("a")
    with pytest.raises(ConfigError, match="is no trained run"):  # fits, but has no checkpoint here
        made.load_frozen(None)


def test_it_is_not_loaded_where_the_student_draws(tmp_path):
    train_and_read(FlowMatching(FlowMatchingConfig(**STUDENT), "cpu"), GREYS, tmp_path / "clip", 1)
    made = recipe(teacher(workdir="nowhere", inputs=CAPTIONS))
    assert made.load_frozen(None, "generate") == {}
    frozen = recipe(
        teacher(workdir="nowhere"), inputs=dataclasses.replace(CAPTIONS, text_workdir=str(tmp_path / "clip"))
    ).load_frozen(None, "generate")
    assert set(frozen) == {"text"}


# --- the configs for pods ---


@pytest.mark.parametrize("name", PODS)
def test_at_full_size_the_teacher_has_eight_billion_parameters_and_the_student_379_million(name):
    made = from_config(name)
    frozen, state = made.frozen_spec(), jax.eval_shape(made.init, key(0, 0, "init"))
    position_table = 192**2 * 2432
    assert count_parameters(frozen["teacher/mmdit"]) == 8_056_627_520 + position_table
    assert abs(count_parameters(state.players["model"].params["unet"]) / 379.04e6 - 1) < 1e-3
    two = name.endswith("kdmd")
    assert ("trunk/unet" in frozen) == ("discriminator" in state.players) == (name.startswith("fewstep") and not two)
    assert ("score_teacher/mmdit" in frozen) == ("critic" in state.players) == two
    assert set(frozen) <= {"teacher/mmdit", "score_teacher/mmdit", "trunk/unet"}


LOSSES = {
    "4step": {"loss/output", "loss/adversarial", "loss/discriminator"},
    "4step_kdmd": {"loss/output", "loss/feature", "loss/matching", "loss/critic"},
}


@pytest.mark.parametrize(("name", "arg"), [("4step", ""), ("4step", ":runlocal"), ("4step_kdmd", ":runlocal")])
def test_the_step_takes_what_the_specs_promise(name, arg):
    made = from_config(f"fewstep/t2i_1024_{name}", arg=arg)
    state = jax.eval_shape(made.init, key(0, 0, "init"))
    (spec,) = made.batch_specs().values()
    new, metrics = jax.eval_shape(make_step(made, 0), state, made.frozen_spec(), spec)
    assert jax.tree.map(lambda s: s.shape, new) == jax.tree.map(lambda s: s.shape, state)
    assert LOSSES[name] <= set(metrics)


def test_the_configs_of_few_steps_ask_each_teacher_what_it_knows():
    four, eight, kdmd = (from_config(f"fewstep/t2i_1024_{name}") for name in ("4step", "8step", "4step_kdmd"))
    turbo = reference_times(4, 3.0)[:-1]  # of its own sampler
    for made in (four, kdmd):
        np.testing.assert_allclose(made.teacher.config.few_step_times, turbo, atol=1e-6)
        np.testing.assert_allclose(made.levels.t, turbo, atol=1e-6)
    large = eight.teacher.config
    assert (large.few_step_times, large.guidance, large.rollout_steps, len(eight.levels.t)) == ((), 4.0, 4, 8)
    score = kdmd.score.config
    assert (score.few_step_times, score.guidance, score.rollout_steps, score.inputs) == ((), 4.0, 1, large.inputs)
    assert (kdmd.config.generator_every, kdmd.config.own_samples, kdmd.config.critic_times) == (5, 1.0, (0.02, 0.98))


def test_the_four_step_config_runs_locally(tmp_path):
    spec = f"{CONFIGS}/fewstep/t2i_1024_4step.py:runlocal"
    overrides = ["train_steps=3", "log_every_steps=1", "tensorboard=False", "data.source=synthetic"]
    resolved = load_experiment(spec, overrides)
    state = Experiment(resolved, tmp_path).train()
    assert int(state.step) == 3 and int(state.skipped) == 0
