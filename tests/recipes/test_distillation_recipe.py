"""Distillation as a recipe: what the teacher adds, what he must not be touched by, and what stays without him."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.losses.distillation import ScalingConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.counting import count_macs
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.recipes import distillation, flow_matching
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig, TeacherConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, SamplingConfig
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import make_step
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe, frozen_for_generation
from tests.recipes_for_tests import GREY_TOKENS, ByPosition, greys, random_like, state_away_from_zero, train_and_read

GREYS = ByPosition("8x8", greys)
MMDIT = MMDiTConfig.preset("smoke", latent_channels=12, depth=2, dual=0)  # of all networks the quickest to compile
STUDENT = {
    "batch_size": 8,
    "train_steps": 40,
    "image_sizes": ((8, 8),),
    "network": "mmdit",
    "mmdit": MMDIT,
    "text": ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS, layers=1),
    "codec": CodecConfig(patch=2),
    "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    "sampling": SamplingConfig(steps=3, guidance=2.0),
}
TEACHER = TeacherConfig(mmdit=MMDIT)
CONFIG = DistillationConfig(**STUDENT, teacher=TEACHER, student_taps=("block_00",), teacher_taps=("block_01",))


def recipe(teacher=TEACHER, **changes):
    return Distillation(dataclasses.replace(CONFIG, teacher=teacher, **changes), "cpu")


@pytest.fixture(scope="module")
def taught():
    """A recipe with both losses, a teacher, a state away from the start, and drawn examples."""
    made = recipe()
    frozen = random_like(made.frozen_spec())
    return made, frozen, state_away_from_zero(made), jax.jit(made.draw)(frozen, greys(), jax.random.key(3), 0)


def test_projectors_are_drawn_from_keys_of_their_own(monkeypatch):
    keys, init = [], distillation.init
    for module in (distillation, flow_matching):
        monkeypatch.setattr(module, "init", lambda network, key: keys.append(key) or init(network, key))
    recipe(student_taps=("block_00",) * 2, teacher_taps=("block_00", "block_01")).init(jax.random.key(0))
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys) == 4


def gradients(made, given, params, drawn):
    return jax.jit(jax.grad(lambda params, given: made.loss({**given, **params}, drawn)[0], argnums=(0, 1)))(
        params, given
    )


def test_it_fulfils_the_protocol():
    assert isinstance(recipe(), Recipe)


@pytest.mark.parametrize("term", ["output", "feature"])
def test_each_loss_by_itself_reaches_the_student_and_never_the_teacher(taught, term):
    _, frozen, state, drawn = taught
    alone = ScalingConfig(alpha="constant", constant=0.0, alpha_bounds=(0.0, 1.0), ratio="none")
    made = recipe(**{f"{other}_weight": 0.0 for other in ("output", "feature") if other != term}, scaling=alone)
    params = {n: p for n, p in state.players["model"].params.items() if n in ("mmdit", "text") or n in made.projectors}
    by_student, by_teacher = gradients(made, frozen, params, drawn)
    assert all(not np.any(g) for g in jax.tree.leaves(by_teacher))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(by_student["mmdit"])) > 1e-5
    if term == "feature":
        assert all(np.any(g) for g in jax.tree.leaves(by_student["projector_0"]))


def test_without_any_weight_it_is_flow_matching_bit_for_bit():
    plain = FlowMatching(FlowMatchingConfig(**STUDENT), "cpu")
    bare = recipe(output_weight=0.0, feature_weight=0.0)
    assert bare.frozen_spec() == {}
    states = []
    for made in (plain, bare):
        state, _ = jax.jit(make_step(made, 0))(state_away_from_zero(made), {}, greys())
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.fixture(scope="module")
def updated(taught):
    """The state after one update, and its metrics."""
    made, frozen, state, _ = taught
    return jax.jit(make_step(made, 0))(state, frozen, greys())


def test_the_running_means_follow_the_losses_that_are_reported(updated):
    new, metrics = updated
    for name in ("task", "output", "feature"):
        part = new.extra["means"][name]
        mean = part["total"].sum() / part["count"].sum()
        np.testing.assert_allclose(mean, metrics[f"loss/{name}"], rtol=1e-5)
        assert part["count"].sum() > 0 and float(metrics[f"loss/{name}"]) > 0


def test_accumulation_changes_nothing_but_rounding(taught, updated):
    _, frozen, state, _ = taught
    one, m1 = updated
    four, m4 = jax.jit(make_step(recipe(microbatches=4), 0))(state, frozen, greys())
    np.testing.assert_allclose(m1["grad_norm"], m4["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one.extra["means"], four.extra["means"])


def test_one_projector_serves_every_image_size():
    made = recipe(image_sizes=((8, 8), (8, 16)))
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    wide = {**greys(), "image": np.tile(greys()["image"], (1, 1, 2, 1))}
    update = jax.jit(make_step(made, 0))
    for batch in (greys(), wide):
        state, metrics = update(state, frozen, batch)
        assert bool(metrics["finite"]) and float(metrics["loss/feature"]) > 0


def test_image_sizes_at_which_features_relate_otherwise_are_refused(monkeypatch):
    def maps(network, spec, latent, taps):
        return dict.fromkeys(taps, (1, 8, 8, 8) if network.config.depth == 3 else (1, 4, latent[1], 8))

    monkeypatch.setattr(distillation, "tap_shapes", maps)
    mmdit = dataclasses.replace(MMDIT, depth=3)
    assert recipe(mmdit=mmdit).projectors
    with pytest.raises(ConfigError, match=r"another ratio of sizes at \(8, 16\) than at \(8, 8\)"):
        recipe(mmdit=mmdit, image_sizes=((8, 8), (8, 16)))


def ask(made, given, drawn, x_t, context):
    return jax.jit(lambda *args: made.ask_teacher(*args, ())[0])(given, drawn, x_t, context)


def test_the_teacher_is_asked_once_for_velocity_and_features(taught):
    made, frozen, state, drawn = taught
    given = {**frozen, **state.players["model"].params}
    context = jax.eval_shape(made.condition, given, drawn)

    def work(*taps):
        return count_macs(lambda *args: made.ask_teacher(*args, taps), given, drawn, drawn["eps"], context)

    assert work("block_00", "block_01") == work() > 0


def test_a_guided_teacher_is_followed_beyond_the_conditional_velocity(taught):
    made, frozen, state, drawn = taught
    given = {**frozen, **state.players["model"].params}
    context = jax.jit(made.condition)(given, drawn)
    guided = recipe(dataclasses.replace(TEACHER, guidance=3.0))
    null = jax.tree.map(lambda e, c: jnp.broadcast_to(e, c.shape), made.teacher_null_context(given), context)
    v, v_null = (ask(made, given, drawn, drawn["eps"], c) for c in (context, null))
    w = ask(guided, given, drawn, drawn["eps"], context)
    np.testing.assert_allclose(w, v_null + 3 * (v - v_null), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(w - v).max()) > 1e-3


def test_a_rollout_leads_where_the_teachers_own_sampler_does(taught):
    made, frozen, state, drawn = taught
    given = {**frozen, **state.players["model"].params}
    context = jax.jit(made.condition)(given, drawn)
    eps, t = drawn["eps"], jnp.ones(8)

    def denoise(x, t, i, carry):
        return made.ask_teacher(given, {**drawn, "t": t}, x, context, ())[0], carry

    end, _ = jax.jit(lambda eps: sample(denoise, eps, jnp.linspace(1.0, 0.0, 5)))(eps)
    rolled = recipe(dataclasses.replace(TEACHER, rollout_steps=4))
    v = ask(rolled, given, {**drawn, "t": t}, eps, context)
    np.testing.assert_allclose(eps - v, end, rtol=1e-4, atol=1e-4)
    for t in (0.01, 0.0):  # a short way, along which the velocity hardly changes
        near = {**drawn, "t": jnp.full(8, t)}
        v, one = (ask(who, given, near, drawn["x_0"], context) for who in (rolled, made))
        assert jnp.linalg.norm(v - one) < 0.15 * jnp.linalg.norm(one), t


def test_a_teacher_with_other_latents_teaches_features_from_the_same_image_with_noise_of_its_own():
    codec = CodecConfig(patch=4)
    teacher = TeacherConfig(mmdit=dataclasses.replace(MMDIT, latent_channels=48), codec=codec)
    made = recipe(teacher, output_weight=0.0)
    frozen = random_like(made.frozen_spec())
    drawn = jax.jit(made.draw)(frozen, greys(), jax.random.key(0), 0)
    assert drawn["teacher_x_0"].shape == (8, 2, 2, 48) and drawn["x_0"].shape == (8, 4, 4, 12)
    of_the_times = np.log(drawn["t"]) - np.log1p(-drawn["t"])  # of one key its beginning would be these numbers
    assert not np.isclose(of_the_times[:, None], np.ravel(drawn["teacher_eps"]), rtol=0, atol=1e-6).any()
    _, metrics = jax.jit(make_step(made, 0))(state_away_from_zero(made), frozen, greys())
    assert bool(metrics["finite"]) and float(metrics["loss/feature"]) > 0
    with pytest.raises(ValueError, match="output_weight=0"):
        recipe(teacher)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ({}, {"teacher_taps": ()}, "pair by pair"),
        ({}, {"teacher_taps": ("block_09",)}, "block_00 to block_01"),
        ({"mmdit": MMDiTConfig.preset("smoke")}, {}, "12 channels and the teacher's 4"),
        ({}, {"student_taps": (), "teacher_taps": ()}, "no features to compare"),
        ({}, {"output_weight": -1.0}, "output_weight=-1.0 and"),
        ({}, {"feature_weight": -0.1}, "feature_weight=-0.1; give 0 or more"),
        ({"weights": "b", "text": STUDENT["text"]}, {}, r"leave teacher\.text out"),
        ({}, {"scaling": ScalingConfig(ratio="batch"), "microbatches": 2}, "that of a microbatch, and there are 2"),
        ({"rollout_steps": 0}, {}, r"teacher\.rollout_steps=0"),
        ({"workdir": "a", "weights": "b"}, {}, "one of them"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(teacher, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(dataclasses.replace(TEACHER, **teacher), **changes)


def test_a_warm_start_keeps_the_projectors_that_fit_and_no_others():
    earlier = random_like(jax.eval_shape(recipe(projector_hidden=4).init, key(0, 0, "init")).players["model"].params)
    for hidden in (4, None):
        made = recipe(student_taps=("block_00",) * 2, teacher_taps=("block_01",) * 2, projector_hidden=hidden)
        state = jax.jit(made.init)(key(0, 0, "init"))
        fresh, started = (s.players["model"].params for s in (state, made.warm_start(state, {"model": earlier})))
        for name in ("mmdit", "projector_0", "projector_1"):
            kept = name == "mmdit" or (name == "projector_0" and hidden == 4)
            jax.tree.map(np.testing.assert_array_equal, started[name], (earlier if kept else fresh)[name])


def test_without_a_teacher_to_load_it_says_which_key_to_set():
    with pytest.raises(ConfigError, match=r"teacher\.workdir"):
        recipe().load_frozen(None)


@pytest.mark.parametrize(
    ("run", "tokenizer", "message"),
    [
        ({}, "a", "is no trained run"),  # fits, but has no checkpoint here
        ({"prediction": "x_0"}, "a", r"predicts 'x_0'; set teacher\.prediction"),
        ({"codec": dataclasses.asdict(CodecConfig(patch=2, scale=9.0))}, "a", r"has the latents .* set teacher\.codec"),
        ({"codec": dataclasses.asdict(CodecConfig("identity"))}, "a", "has the latents"),
        ({"text_workdir": ""}, "a", r"a text encoder of its own; set teacher\.text"),
        ({}, "b", "set text_workdir to the same"),
    ],
)
def test_a_run_that_is_not_what_the_config_says_is_refused(tmp_path, run, tokenizer, message):
    codec = dataclasses.asdict(STUDENT["codec"])
    fits = {"prediction": "velocity", "codec": codec, "text_workdir": "moved/since"}
    for name, tokens in (("teacher", "a"), ("clip", tokenizer)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(tokens)
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({**fits, **run}))
    made = recipe(TeacherConfig(workdir=str(tmp_path / "teacher"), mmdit=MMDIT), text_workdir=str(tmp_path / "clip"))
    with pytest.raises(ConfigError, match=message):
        made.load_frozen(None)


def test_a_run_learns_from_a_trained_teacher_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    teacher = FlowMatching(FlowMatchingConfig(**STUDENT), "cpu")
    train_and_read(teacher, GREYS, tmp_path / "teacher", 2)
    run = TeacherConfig(workdir=str(tmp_path / "teacher"), mmdit=MMDIT, text=STUDENT["text"])
    made = recipe(run)
    assert frozen_for_generation(made) == {}, "the teacher is not loaded where the student draws"
    frozen = made.load_frozen(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    before = fingerprint(frozen)
    with monkeypatch.context() as patched:
        patched.setattr(made, "load_frozen", lambda mesh: frozen)
        straight, lines = train_and_read(made, GREYS, tmp_path / "straight", 4)
    assert fingerprint(frozen) == before, "the very arrays that four updates were given"
    train_and_read(made, GREYS, tmp_path / "stopped", 2)
    resumed, again = train_and_read(made, GREYS, tmp_path / "stopped", 4)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert lines == again and "loss/feature" in lines[-1]
    stored = Checkpointer(tmp_path / "straight").meta(4)["shapes"]
    parameters = {name.split("/")[4] for name in stored if name.startswith("state/players/model/params")}
    assert parameters == {"mmdit", "text", "projector_0"} and not any("teacher" in name for name in stored)
    other = recipe(dataclasses.replace(run, mmdit=dataclasses.replace(MMDIT, depth=3)))
    with pytest.raises(ConfigError, match="teacher' holds another network than the config"):
        other.load_frozen(None)


def test_the_teacher_is_split_over_the_mesh_and_the_student_whole_where_asked():
    made = recipe(shard_student=False)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    teacher = tree_shardings(made.frozen_spec(), made.rules(), mesh)
    whole = [
        "/".join(path)
        for path, place in flatten(teacher).items()
        if place.is_fully_replicated and np.prod(flatten(made.frozen_spec())[path].shape) > 256
    ]
    assert not whole
    state = jax.eval_shape(made.init, key(0, 0, "init"))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(tree_shardings(state, made.rules(), mesh)))
    sharded = jax.tree.leaves(tree_shardings(state, recipe().rules(), mesh))
    assert not all(s.is_fully_replicated for s in sharded)
