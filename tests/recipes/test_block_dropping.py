"""Robust training: which blocks run, what is measured without one, and how an evolved network begins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.evolved import changed
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.block_dropping import RUNS, BlockDropping, BlockDroppingConfig, ablations
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import ONE_STAGE, greys, state_away_from_zero
from tests.students_for_tests import MMDIT, STUDENT

NETWORK = UNetConfig.preset("smoke", latent_channels=12, **ONE_STAGE)
BLOCKS = ("down_0_0_residual_block", "mid_residual_block", "mid_transformer")
CONFIG = BlockDroppingConfig(**{**STUDENT, "network": NETWORK}, drop=0.2, final_drop=0.6)


def recipe(**changes):
    return BlockDropping(dataclasses.replace(CONFIG, **changes), "cpu")


RECIPE = recipe()
STATE = state_away_from_zero(RECIPE)
PARAMS = {"model": STATE.players["model"].params}
NETWORKS = PARAMS["model"]


def test_it_fulfils_the_protocol_and_knows_its_blocks():
    assert isinstance(RECIPE, Recipe) and RECIPE.blocks == BLOCKS


def test_which_blocks_run_is_one_draw_for_the_batch_and_grows_rarer():
    draw = jax.jit(RECIPE.draw)
    shares = []
    for step in (0, 20, 40):
        runs = np.stack([draw(NETWORKS, greys(), jax.random.key(i), step)["runs"] for i in range(80)])
        assert runs.shape == (80, 8, len(BLOCKS)) and (runs == runs[:, :1]).all()
        shares.append(1 - runs.mean())
    np.testing.assert_allclose(shares, [0.2, 0.4, 0.6], atol=0.1)


def test_without_dropping_it_is_flow_matching():
    fields = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(FlowMatchingConfig)}
    plain = FlowMatching(FlowMatchingConfig(**fields), "cpu")

    def lowered(made):
        state = jax.eval_shape(made.init, jax.random.key(0))
        return jax.jit(make_step(made, 0)).lower(state, {}, greys()).as_text()

    bare = lowered(recipe(drop=0.0, final_drop=0.0))
    assert bare == lowered(plain)
    dropping = lowered(RECIPE)
    assert dropping.count("stablehlo.case") > bare.count("stablehlo.case")  # a branch for each block


def test_an_update_is_finite_whichever_blocks_run_and_says_how_many_did():
    step, state, shares = jax.jit(make_step(RECIPE, 0)), STATE, set()
    for _ in range(8):
        state, metrics = step(state, {}, greys())
        assert bool(metrics["finite"])
        shares.add(round(float(metrics["ran"]), 3))
    assert len(shares) > 1 and shares <= {0.0, 0.333, 0.667, 1.0}


def test_the_loss_without_a_block_is_that_of_the_network_without_it():
    numbers = jax.jit(RECIPE.validation_loss)(PARAMS, {}, greys(), jax.random.key(1))
    each = jnp.stack([numbers[f"without.{block}"] for block in BLOCKS])
    np.testing.assert_allclose(numbers["without.one"], each.mean(axis=0), rtol=1e-4, atol=1e-5)
    network, moved = changed(NETWORK, "mid_transformer", "remove")
    less = recipe(network=network, moved=moved)
    started = less.warm_start(state_away_from_zero(less), PARAMS)
    assert less.blocks == BLOCKS[:2]
    params = {"model": started.players["model"].params}
    plain = jax.jit(lambda p: FlowMatching.validation_loss(less, p, {}, greys(), jax.random.key(1)))(params)
    np.testing.assert_allclose(
        plain["mean"] - numbers["mean"], numbers["without.mid_transformer"], rtol=1e-3, atol=1e-4
    )
    assert np.abs(numbers["without.mid_transformer"]).max() > 1e-3


def test_an_evolved_network_begins_with_its_copies_as_their_originals():
    network, moved = changed(NETWORK, "mid_transformer", "copy")
    more = recipe(network=network, moved=moved)
    started = more.warm_start(state_away_from_zero(more), PARAMS)
    params = started.players["model"].params
    copy = params["unet"]["mid_more_transformers"]["block_00"]
    jax.tree.map(np.testing.assert_array_equal, copy, NETWORKS["unet"]["mid_transformer"])
    for path, leaf in flatten(NETWORKS).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf)
    with pytest.raises(ConfigError, match="mid_more_transformers"):
        recipe(network=network).warm_start(state_away_from_zero(more), PARAMS)


def test_which_blocks_run_while_drawing_is_said_beside_the_weights():
    x_t, level = jax.random.normal(jax.random.key(0), (2, 4, 4, 12)), CONFIG.schedule.level(jnp.full(2, 0.5))
    tokens = {name: greys()[name][:2] for name in ("tokens", "mask")}

    @jax.jit
    def denoise(runs):
        networks = RECIPE.weights({**PARAMS, RUNS: runs}, {})
        return RECIPE.denoise(networks, x_t, level, 0, None, RECIPE.inputs.condition(networks, tokens), None)[0]

    whole = denoise(jnp.ones(len(BLOCKS), bool))
    assert all(np.abs(denoise(jnp.asarray(runs)) - whole).max() > 1e-4 for runs in ablations(len(BLOCKS)))


def test_a_network_without_such_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"set network.kind to 'unet' or 'sd_unet'"):
        recipe(network=MMDIT)
