"""A method unlike any of ours trains, resumes and shards without a change under `training/`."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training import checkpoint
from snapgen_jax.training.checkpoint import CheckpointConfig, Checkpointer
from snapgen_jax.training.exits import ConfigError, DivergedError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig, train
from snapgen_jax.training.recipe import Recipe
from tests.recipes_for_tests import Adds, Sequences, TwoPlayers

CONFIG = LoopConfig(
    train_steps=30,
    log_every_steps=4,
    tensorboard=False,
    mesh=MeshConfig(data=1),
    checkpoint=CheckpointConfig(every_steps=7),
)
ONE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def run(workdir=None, mesh=ONE, recipe=None, **changes):
    recipe = recipe or TwoPlayers()
    return train(
        recipe, Sequences(recipe), dataclasses.replace(CONFIG, **changes), workdir=workdir, mesh=mesh, quiet=True
    )


def lines(workdir):
    return (workdir / "metrics" / "train.jsonl").read_bytes()


@pytest.mark.parametrize("recipe", [TwoPlayers(), Adds()], ids=["two players", "adds"])
def test_the_recipe_fulfils_the_protocol(recipe):
    assert isinstance(recipe, Recipe) and isinstance(recipe.inputs, Inputs)
    params = {name: player.params for name, player in recipe.init(key(0, 0, "init")).players.items()}
    frozen = recipe.load_frozen(None)
    roles = [role for roles in recipe.trains.values() for role in roles]
    assert (
        recipe.weights(params, frozen).keys() == {*roles, *recipe.frozen_spec()}
        and recipe.trains.keys() == params.keys()
    )
    spec = jax.eval_shape(lambda: frozen)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), spec) == jax.tree.map(
        lambda s: (s.shape, s.dtype), recipe.frozen_spec()
    )


def test_it_learns_and_the_critic_steps_every_third_update(tmp_path):
    state = run(tmp_path)
    losses = [json.loads(line)["loss"] for line in lines(tmp_path).splitlines()]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    assert int(state.extra["critic_steps"]) == 10
    assert float(state.extra["mean_loss"]) > 0
    assert state.players["critic"].ema is None


def test_a_run_in_two_parts_is_the_same_run_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(whole)
    run(parts, train_steps=11)
    with (parts / "metrics" / "train.jsonl").open("a") as file:  # work after the last save, as a crash leaves it
        file.write('{"step": 12, "loss": 1.0, "finite": true}\n{"step": 13, "lo')
    resumed = run(parts)
    assert fingerprint(resumed) == fingerprint(expected)
    assert lines(parts) == lines(whole)


def test_the_data_stream_is_entered_at_the_restored_position(tmp_path):
    run(tmp_path, train_steps=11)
    recipe = TwoPlayers()
    data = Sequences(recipe)
    train(recipe, data, CONFIG, workdir=tmp_path, mesh=ONE, quiet=True)
    assert data.drawn == list(range(11, 30))


def test_metrics_are_written_an_interval_late_so_that_no_update_waits_for_them(tmp_path):
    on_record = []

    class Watched(Sequences):
        def batches(self, position):
            for batch in super().batches(position):
                path = tmp_path / "metrics" / "train.jsonl"
                on_record.append(path.read_text().count("\n") if path.exists() else 0)
                yield batch

    recipe = TwoPlayers()
    config = dataclasses.replace(CONFIG, train_steps=9, log_every_steps=3, checkpoint=CheckpointConfig(every_steps=100))
    train(recipe, Watched(recipe), config, workdir=tmp_path, mesh=ONE, quiet=True)
    assert on_record == [0, 0, 0, 0, 0, 0, 3, 3, 3]
    assert len(lines(tmp_path).splitlines()) == 9


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=8)])
def test_any_mesh_gives_the_same_losses(tmp_path, mesh):
    run(tmp_path / "one")
    state = run(tmp_path / "many", mesh=make_mesh(mesh))
    one, many = ([json.loads(line)["loss"] for line in lines(tmp_path / name).splitlines()] for name in ("one", "many"))
    np.testing.assert_allclose(many, one, rtol=1e-5)
    kernel = state.players["predictor"].params["kernel"]
    moments = [x for x in jax.tree.leaves(state.players["predictor"].opt_state) if x.shape == kernel.shape]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 8 // mesh.fsdp)
    assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)
    ema = state.players["predictor"].ema["kernel"]
    assert ema.sharding == kernel.sharding


def test_a_checkpoint_of_eight_devices_restores_on_three_and_on_one(tmp_path):
    sizes = {"batch_size": 24}
    run(tmp_path, mesh=make_mesh(MeshConfig(data=2, fsdp=4)), recipe=TwoPlayers(**sizes), train_steps=7)
    before = run(tmp_path, mesh=make_mesh(MeshConfig(data=2, fsdp=4)), recipe=TwoPlayers(**sizes), train_steps=7)
    for count in (3, 1):
        mesh = make_mesh(MeshConfig(data=-1), jax.devices()[:count])
        restored = run(tmp_path, mesh=mesh, recipe=TwoPlayers(**sizes), train_steps=7)
        assert fingerprint(restored) == fingerprint(before)


def test_the_average_alone_restores_on_one_device(tmp_path):
    state = run(tmp_path, mesh=make_mesh(MeshConfig(data=2, fsdp=4)))
    spec = {name: jax.eval_shape(lambda t: t, player.params) for name, player in state.players.items()}
    weights = Checkpointer(tmp_path).restore_weights(spec, 30)
    assert fingerprint(weights["predictor"]) == fingerprint(state.players["predictor"].ema)
    assert fingerprint(weights["critic"]) == fingerprint(state.players["critic"].params)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(weights))


def test_an_update_that_is_not_finite_is_discarded_and_counted(tmp_path):
    state = run(tmp_path, recipe=TwoPlayers(poison=[4, 9]))
    clean = run(recipe=TwoPlayers())
    assert int(state.skipped) == 2 and int(state.step) == 30
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    records = [json.loads(line) for line in lines(tmp_path).splitlines()]
    assert [r["step"] for r in records if not r["finite"]] == [5, 10]
    assert fingerprint(state.players) != fingerprint(clean.players)


class WithoutNorm(TwoPlayers):
    """Reports the gradient norm of one of its two players."""

    def update(self, state, frozen, batch, key):
        new, metrics = super().update(state, frozen, batch, key)
        return new, {"loss": metrics["loss"], "grad_norm/critic": jnp.float32(1)}


def test_an_update_that_is_not_finite_is_discarded_without_a_gradient_norm_to_tell(tmp_path):
    state = run(tmp_path, recipe=WithoutNorm(poison=[4, 9]))
    assert int(state.skipped) == 2 and int(state.step) == 30
    told = run(recipe=TwoPlayers(poison=[4, 9]))  # another program, which may round otherwise
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.players, told.players)


def test_too_many_bad_updates_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    recipe = TwoPlayers(poison=list(range(9, 30)))
    with pytest.raises(DivergedError, match=r"5 updates in a row were not finite, up to step 14.*step 7 is intact"):
        run(tmp_path, recipe=recipe, max_skipped_steps=5)
    assert Checkpointer(tmp_path).latest_step() in (7, 14)
    good = run(tmp_path / "good", train_steps=9)
    state = run(tmp_path, train_steps=14)
    assert fingerprint(state.players) != fingerprint(good.players)  # and it goes on, from finite weights
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"batch of 20 does not divide over 8 devices.*16 or 24"):
        run(mesh=make_mesh(MeshConfig(data=8)), recipe=TwoPlayers(batch_size=20))


def test_another_global_batch_is_refused_on_resume(tmp_path):
    run(tmp_path, train_steps=7)
    with pytest.raises(ConfigError, match=r"global_batch of this workdir is \{'length4': 16.*asks for \{'length4': 24"):
        run(tmp_path, recipe=TwoPlayers(batch_size=24))


def test_a_checkpoint_of_another_shape_is_refused_leaf_by_leaf(tmp_path, monkeypatch):
    run(tmp_path, train_steps=7)
    init = TwoPlayers.init

    def wider(self, key):
        state = init(self, key)
        predictor = state.players["predictor"]
        params = {**predictor.params, "scale": jax.numpy.ones(3)}
        return state.replace(players={**state.players, "predictor": dataclasses.replace(predictor, params=params)})

    monkeypatch.setattr(TwoPlayers, "init", wider)
    with pytest.raises(ConfigError, match=r"players/predictor/params/scale: not in the checkpoint"):
        run(tmp_path)


def test_a_changed_frozen_network_is_refused_on_resume(tmp_path, monkeypatch):
    run(tmp_path, train_steps=7)
    monkeypatch.setattr(TwoPlayers, "load_frozen", lambda self, mesh, use="train": {"projection": jax.numpy.eye(8)})
    with pytest.raises(ConfigError, match="frozen of this workdir"):
        run(tmp_path)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match=r"mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 does not fit 8 devices"):
        make_mesh(MeshConfig(data=3))


def test_checkpoints_in_an_object_store_lie_beside_the_rest_of_the_workdir(monkeypatch):
    """`epath.Path("gs://...").absolute()` is a path under the current directory, which no store has."""
    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", lambda directory, **options: directory)
    assert str(checkpoint.Checkpointer("gs://bucket/run").directory) == "gs://bucket/run/checkpoints"
    assert str(checkpoint.Checkpointer("run").directory) == f"{pathlib.Path.cwd()}/run/checkpoints"
