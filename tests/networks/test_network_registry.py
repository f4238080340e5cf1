"""Every network there is: its config knows its inputs, its sharding rules and its taps."""

import re
import typing

import jax
import pytest

from snapgen_jax.networks.module import apply, build, flatten, init
from snapgen_jax.networks.projector import ProjectorConfig
from snapgen_jax.networks.registry import CONFIGS, DenoiserConfig, TextEncoderConfig
from snapgen_jax.networks.text import TextContext

SMALL = [cls.preset("smoke") for cls in CONFIGS if cls.PRESETS] + [ProjectorConfig(in_width=4, out_width=6)]
by_kind = pytest.mark.parametrize("config", SMALL, ids=[config.kind for config in SMALL])


def run(config, batch, *sizes, **options):
    network, spec = build(config)
    return jax.eval_shape(lambda p, a: apply(network, p, *a, **options), spec, config.input_spec(batch, *sizes))


def test_every_network_is_tested_here():
    assert {type(config) for config in SMALL} == set(CONFIGS)


@by_kind
def test_a_network_runs_on_the_inputs_that_its_config_names(config):
    for batch in (1, 3):
        outputs = jax.tree.leaves(run(config, batch))
        assert outputs and {leaf.shape[0] for leaf in outputs} == {batch}


@by_kind
def test_a_network_returns_and_replaces_every_intermediate_that_its_config_names(config):
    names = config.tap_names()
    if not names:
        with pytest.raises(TypeError, match="taps"):
            run(config, 2, taps=())
        return
    v, found = run(config, 2, taps=names)
    assert sorted(found) == sorted(names) and len(set(names)) == len(names)
    network, spec = build(config)
    again = jax.eval_shape(
        lambda p, a, r: apply(network, p, *a, taps=names, reuse=r), spec, config.input_spec(2), found
    )
    assert again == (v, found)


@by_kind
def test_what_is_built_without_drawing_has_the_shapes_and_dtypes_of_what_is_drawn(config):
    network, spec = build(config)
    assert jax.eval_shape(lambda key: init(network, key), jax.random.key(0)) == spec


@by_kind
def test_every_sharding_rule_of_a_network_finds_a_parameter(config):
    paths = {"/".join(path): leaf.ndim for path, leaf in flatten(build(config)[1]).items()}
    for pattern, spec in config.rules():
        assert any(re.search(pattern, path) and len(spec) <= rank for path, rank in paths.items()), pattern


@pytest.mark.parametrize("cls", typing.get_args(DenoiserConfig))
def test_a_denoiser_takes_a_latent_time_features_and_a_text_and_gives_a_velocity(cls):
    config = cls.preset("smoke")
    x, time, context = config.input_spec(2, 8, 4, tokens=7)
    assert x.shape == (2, 8, 4, config.latent_channels) and time.shape == (2, config.time_width)
    assert isinstance(context, TextContext) and context.sequence.shape == (2, 7, config.context_width)
    v, _ = run(config, 2, 8, 4)
    assert v.shape == x.shape


@pytest.mark.parametrize("cls", typing.get_args(TextEncoderConfig))
def test_a_text_encoder_takes_tokens_and_a_mask_and_gives_a_text_context(cls):
    context = run(cls.preset("smoke"), 2, 6)
    assert isinstance(context, TextContext) and context.sequence.shape[:2] == context.mask.shape == (2, 6)
