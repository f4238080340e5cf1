"""A table for a grid of times: the same outputs, without the layers that are told the time alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import ParameterMismatchError, apply, build, flatten
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_cache import TimeCachedConfig, cached_values, depends_on_time_alone, with_table
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from tests.recipes_for_tests import random_like

STEPS = 3
ONE_STAGE = {
    "channels": (8,), "down_depth": (1,), "up_depth": (0,), "mid_depth": 0,
    "self_attention": (False,), "cross_attention": (True,),
}  # fmt: skip
SMALL_SD = {"channels": (16,), "down": (("ra",),), "up": (("r", "r"),), "heads": (2,), "depth": (1,)}
NETWORKS = {
    "unet without pooled text": UNetConfig.preset("smoke", pooled_width=None, **ONE_STAGE),
    "unet with pooled text": UNetConfig.preset("smoke", **ONE_STAGE),
    "stable diffusion": SDUNetConfig.preset("smoke", **SMALL_SD),
    "mmdit": MMDiTConfig.preset("smoke"),
    "dit": DiTConfig.preset("smoke"),
}


@pytest.fixture(scope="module", autouse=True)
def networks_are_quick_to_compile(quick_to_compile):
    """See `quick_to_compile`."""


@functools.cache
def params(name):
    return random_like(build(NETWORKS[name])[1], 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_on_the_grid_are_the_same_with_a_table_as_with_the_layers(name):
    config = NETWORKS[name]
    cached = TimeCachedConfig.of(config, STEPS)
    features = time_features(jnp.array([1.0, 0.6, 0.2]), config.time_width)
    x, _, context = random_like(config.input_spec(STEPS, 8, 8, 5), 2)
    context = TextContext(context.sequence, jnp.ones_like(context.mask), context.pooled)

    @jax.jit
    def both(params, x, context):
        table = with_table(config, params, features)
        rows = apply(build(cached)[0], table, x, jnp.eye(STEPS), context)[0]
        return apply(build(config)[0], params, x, features, context)[0], rows

    layers, table = both(params(name), x, context)
    np.testing.assert_allclose(table, layers, atol=1e-6 * float(jnp.abs(layers).max()))
    assert np.abs(layers[0] - layers[1]).max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_of_time_are_gone_and_all_else_is_there(name):
    config = NETWORKS[name]
    before, after = flatten(build(config)[1]), flatten(build(TimeCachedConfig.of(config, STEPS))[1])
    gone, new = set(before) - set(after), set(after) - set(before)
    assert gone == {path for path in before if depends_on_time_alone(config, path)}
    assert {path[:2] for path in gone if path[0] == "time"} == {("time", "inner"), ("time", "outer")}
    assert new and {path[-1] for path in new} == {"table"} and all(after[path].shape[0] == STEPS for path in new)
    projections = "unet without pooled text", "stable diffusion"
    assert any("embedding" in path for path in gone) == (name in projections)
    with pytest.raises(ParameterMismatchError):
        apply(build(TimeCachedConfig.of(config, STEPS))[0], params(name))


def test_the_table_of_stable_diffusion_in_fifty_steps_is_a_million_values():
    assert cached_values(SDUNetConfig.preset("sd15"), 50) == 50 * 20_160
