"""Distillation on stored latents: the configs for pods, at full size by their shapes and in small by running."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import build, load_config, recipe_class
from snapgen_jax.experiment import Experiment, prepare_workdir
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import make_step

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PODS = ("distill/t2i_512_sd35l", "distill/t2i_1024_sd35l", "fewstep/t2i_1024_4step", "fewstep/t2i_1024_8step")


def made(name, *overrides, arg=""):
    config = load_config(f"{CONFIGS / name}.py{arg}", overrides)
    cls = recipe_class(config.recipe)
    return cls(build(cls.Config, config), "cpu")


@pytest.mark.parametrize("name", PODS)
def test_at_full_size_the_teacher_has_eight_billion_parameters_and_the_student_379_million(name):
    recipe = made(name)
    frozen, state = recipe.frozen_spec(), jax.eval_shape(recipe.init, key(0, 0, "init"))
    position_table = 192**2 * 2432
    assert count_parameters(frozen["teacher"]) == 8_056_627_520 + position_table
    assert abs(count_parameters(state.players["model"].params["unet"]) / 379.04e6 - 1) < 1e-3
    assert ("trunk" in frozen) == ("discriminator" in state.players) == name.startswith("fewstep")


@pytest.mark.parametrize("arg", ["", ":runlocal"])
def test_the_step_takes_what_the_specs_promise(arg):
    recipe = made("fewstep/t2i_1024_4step", arg=arg)
    state = jax.eval_shape(recipe.init, key(0, 0, "init"))
    (spec,) = recipe.batch_specs().values()
    new, metrics = jax.eval_shape(make_step(recipe, 0), state, recipe.frozen_spec(), spec)
    assert jax.tree.map(lambda s: s.shape, new) == jax.tree.map(lambda s: s.shape, state)
    assert {"loss/output", "loss/adversarial", "loss/discriminator"} <= set(metrics)


def test_a_dropped_caption_is_dropped_for_the_teacher_too():
    recipe = made("distill/t2i_512_sd35l", "batch_size=400", "caption_dropout=0.5", arg=":runlocal")
    (specs,) = recipe.batch_specs().values()
    batch = {name: jnp.ones(s.shape, s.dtype) for name, s in specs.items()}
    drawn = jax.jit(recipe.draw)({}, batch, jax.random.key(0))
    ours, his = (np.asarray(drawn[name]).any(axis=1) for name in ("mask", "teacher_mask"))
    np.testing.assert_array_equal(ours, his)
    assert 0.4 < ours.mean() < 0.6
    assert not np.asarray(drawn["teacher_sequence"], np.float32)[~ours].any()


def test_a_teacher_with_stored_latents_of_his_own_teaches_features_alone():
    own = ("teacher.codec.kind=identity", "teacher.mmdit.latent_channels=3", "teacher.mmdit.position_size=64")
    with pytest.raises(ValueError, match="output_weight=0"):
        made("distill/t2i_512_sd35l", *own, arg=":runlocal")
    recipe = made("distill/t2i_512_sd35l", *own, "output_weight=0.0", arg=":runlocal")
    (specs,) = recipe.batch_specs().values()
    assert specs["teacher_latent"].shape == (8, 64, 64, 3)


def test_what_made_the_stored_latents_and_text_states_of_the_teacher_is_not_loaded():
    own = ("teacher.codec.kind=autoencoder", "teacher.mmdit.latent_channels=4", "teacher.text.preset=smoke")
    recipe = made("distill/t2i_512_sd35l", *own, "output_weight=0.0", arg=":runlocal")
    assert set(recipe.frozen_spec()["teacher"]) == {"mmdit"} == set(recipe.load_frozen(None)["teacher"])


def test_the_four_step_config_runs_locally(tmp_path):
    spec = f"{CONFIGS}/fewstep/t2i_1024_4step.py:runlocal"
    config = load_config(spec, ["train_steps=3", "log_every_steps=1", "tensorboard=False"])
    prepare_workdir(config, tmp_path)
    state = Experiment(config, tmp_path).train()
    assert int(state.step) == 3 and int(state.skipped) == 0
