"""Distillation as a recipe: what the teacher adds, what must not touch it, and what stays without it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.losses.distillation import ScalingConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.recipes import _assembly, distillation
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, SamplingConfig
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import greys, random_like, state_away_from_zero, train_and_read
from tests.students_for_tests import CAPTIONS, GREYS, MMDIT, STUDENT, TEACHER

SAMPLING = SamplingConfig(steps=3, guidance=2.0)
CONFIG = DistillationConfig(
    **STUDENT, sampling=SAMPLING, teacher=TEACHER, student_taps=("block_00",), teacher_taps=("block_01",)
)


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
    for module in (distillation, _assembly):
        monkeypatch.setattr(module, "init", lambda network, key: keys.append(key) or init(network, key))
    recipe(student_taps=("block_00",) * 2, teacher_taps=("block_00", "block_01")).init(jax.random.key(0))
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys) == 4


def gradients(made, frozen, params, drawn):
    return jax.jit(jax.grad(lambda params, frozen: made.loss({**frozen, **params}, drawn, {})[0], argnums=(0, 1)))(
        params, frozen
    )


def test_it_fulfils_the_protocol():
    assert isinstance(recipe(), Recipe)


def test_the_networks_are_those_of_the_two_and_hold_no_running_mean(taught):
    made, frozen, state, _ = taught
    networks = made.current(state, frozen)
    assert set(networks) == {"mmdit", "text", "projector_0", "teacher/mmdit"} == set(made.networks())
    assert set(made.trains["model"]) == {"mmdit", "text", "projector_0"} == set(state.players["model"].params)
    assert "means" in state.extra


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
    plain = FlowMatching(FlowMatchingConfig(**STUDENT, sampling=SAMPLING), "cpu")
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
    made = recipe(inputs=dataclasses.replace(CAPTIONS, image_sizes=((8, 8), (8, 16))))
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    wide = {**greys(), "image": np.tile(greys()["image"], (1, 1, 2, 1))}
    update = jax.jit(make_step(made, 0))
    for batch in (greys(), wide):
        state, metrics = update(state, frozen, batch)
        assert bool(metrics["finite"]) and float(metrics["loss/feature"]) > 0


def test_image_sizes_at_which_features_relate_otherwise_are_refused(monkeypatch):
    def maps(denoiser, latent, taps):
        return dict.fromkeys(taps, (1, 8, 8, 8) if denoiser.network.config.depth == 3 else (1, 4, latent[1], 8))

    monkeypatch.setattr(distillation, "tap_shapes", maps)
    network = dataclasses.replace(MMDIT, depth=3)
    assert recipe(network=network).projectors
    with pytest.raises(ConfigError, match=r"another ratio of sizes at \(8, 16\) than at \(8, 8\)"):
        recipe(network=network, inputs=dataclasses.replace(CAPTIONS, image_sizes=((8, 8), (8, 16))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_taps": ()}, "pair by pair"),
        ({"teacher_taps": ("block_09",)}, "the network has block_00_attention_input"),
        ({"student_taps": (), "teacher_taps": ()}, "no features to compare"),
        ({"output_weight": -1.0}, "output_weight is -1.0; give 0 or more"),
        ({"feature_weight": -0.1}, "feature_weight is -0.1; give 0 or more; less leads away"),
        ({"scaling": ScalingConfig(ratio="batch"), "microbatches": 2}, "that of a microbatch, and there are 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_a_warm_start_keeps_the_projectors_that_fit_and_no_others():
    earlier = random_like(jax.eval_shape(recipe(projector_hidden=4).init, key(0, 0, "init")).players["model"].params)
    for hidden in (4, None):
        made = recipe(student_taps=("block_00",) * 2, teacher_taps=("block_01",) * 2, projector_hidden=hidden)
        state = jax.jit(made.init)(key(0, 0, "init"))
        fresh, started = (s.players["model"].params for s in (state, made.warm_start(state, {"model": earlier})))
        for name in ("mmdit", "projector_0", "projector_1"):
            kept = name == "mmdit" or (name == "projector_0" and hidden == 4)
            jax.tree.map(np.testing.assert_array_equal, started[name], (earlier if kept else fresh)[name])


def test_a_run_learns_from_a_trained_teacher_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    teacher = FlowMatching(FlowMatchingConfig(**STUDENT, sampling=SAMPLING), "cpu")
    train_and_read(teacher, GREYS, tmp_path / "teacher", 2)
    run = dataclasses.replace(TEACHER, workdir=str(tmp_path / "teacher"), inputs=CAPTIONS)
    made = recipe(run)
    frozen = made.load_frozen(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert set(frozen) == {"teacher/mmdit", "teacher/text"}
    before = fingerprint(frozen)
    with monkeypatch.context() as patched:
        patched.setattr(made, "load_frozen", lambda mesh, use="train": frozen)
        straight, lines = train_and_read(made, GREYS, tmp_path / "straight", 4)
    assert fingerprint(frozen) == before, "the very arrays that four updates were given"
    train_and_read(made, GREYS, tmp_path / "stopped", 2)
    resumed, again = train_and_read(made, GREYS, tmp_path / "stopped", 4)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert lines == again and "loss/feature" in lines[-1]
    stored = Checkpointer(tmp_path / "straight").meta(4)["shapes"]
    parameters = {name.split("/")[4] for name in stored if name.startswith("state/players/model/params")}
    assert parameters == {"mmdit", "text", "projector_0"} and not any("teacher" in name for name in stored)
    other = recipe(dataclasses.replace(run, network=dataclasses.replace(MMDIT, depth=3)))
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
