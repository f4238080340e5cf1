"""The full-size configs of gates: what is trained, and their small forms."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.training.exits import ConfigError

LAZY = "configs/lazy"
# Modules, the numbers of a gate of all of them for one step, and steps.
FULL = {
    "dit_xl2_256": (2 * 28, 2 * 28 * 1152, 50),
    "dit_xl2_512": (2 * 28, 2 * 28 * 1152, 50),
    "sd35_large": (3 * 38 - 1, (3 * 38 - 1) * 2432, 28),
    # Transformer blocks of three stages: 2 of two modules, 8 + 6 of two, 8 + 4 + 12 of three.
    "t2i": (2 * 2 + 10 * 2 + 24 * 3, 4 * 256 + 20 * 512 + 72 * 896, 28),
}


@functools.cache
def shapes(spec):
    recipe: Any = load_experiment(spec).build("cpu")
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    return recipe, state.players["model"].params


@pytest.mark.parametrize("name", FULL)
def test_gates_of_full_size_are_as_many_as_the_paper_counts(name):
    modules, numbers, steps = FULL[name]
    recipe, params = shapes(f"{LAZY}/{name}.py")
    kernels = [gate["kernel"].shape for gate in params["gates"].values()]
    assert set(params) == {"gates"} and len(recipe.modules) == len(kernels) == modules
    assert sum(map(math.prod, kernels)) == numbers * steps and recipe.config.sampling.steps == steps
    config = recipe.config
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.train_steps) == (1e-4, 0.0, 500)
    assert config.ema_decay == 0 and config.optimizer.schedule == "constant"


def test_the_papers_own_numbers_are_those_of_its_config():
    recipe, params = shapes(f"{LAZY}/dit_xl2_256.py")
    config = recipe.config
    assert sum(gate["kernel"].size for gate in params["gates"].values()) == 3_225_600
    assert (config.batch_size, config.inputs.label_dropout, config.sampling.guidance) == (256, 0.1, 1.5)
    assert recipe.may_skip.sum() == 25 and not recipe.may_skip[0]
    # The sampler is DDIM on the steps that the weights were trained with: whole numbers from 999 to 0.
    grid = config.schedule.grid(config.sampling.steps)
    assert grid.time[0] == 999 and (grid.time == jnp.round(grid.time)).all() and grid.t[-1] == 0
    # The error is that of the noise: velocity's times the square of what turns one into the other.
    level = config.schedule.level(jnp.float32(0.5))
    assert float(recipe.time_weight(level)) == pytest.approx(float(config.schedule.loss_weight(level, "eps")))


@pytest.mark.parametrize("name", ["dit_xl2_256", "sd35_large", "t2i"])
def test_a_loss_of_full_size_fits_its_parts(name):
    """Shapes of a whole example of training, through the frozen networks, without a byte of them."""
    recipe, params = shapes(f"{LAZY}/{name}.py")
    (batch,) = recipe.batch_specs().values()

    def loss(params, frozen, batch, key):
        networks = recipe.weights({"model": params}, frozen)
        return recipe.loss(networks, recipe.draw(networks, batch, key), {})

    value, aux = jax.eval_shape(loss, params, recipe.frozen_spec(), batch, jax.random.key(0))
    assert value.shape == () and {x.shape for x in jax.tree.leaves(aux)} == {()}
    assert aux["logits"].keys() == set(recipe.modules)


@pytest.mark.parametrize("spec", [f"{name}.py:runlocal" for name in FULL] + ["sd35_large.py:runlocal,base"])
def test_the_small_form_is_the_same_method(spec):
    recipe, params = shapes(f"{LAZY}/{spec}")
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) < 50_000
    full = load_experiment(f"{LAZY}/{spec.split(':')[0]}").recipe
    assert type(recipe.config.network) is type(full.network) and recipe.config.prediction == full.prediction
    assert recipe.config.schedule.kind == full.schedule.kind and recipe.config.inputs.kind == full.inputs.kind


@pytest.mark.parametrize("name", FULL)
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(ConfigError, match="the argument is runlocal"):
        load_experiment(f"{LAZY}/{name}.py:small")
