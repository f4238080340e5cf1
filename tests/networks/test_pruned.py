"""A decoder of fewer channels: which stay, and that what stays fits together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.module import apply, build, count_parameters, flatten, unflatten
from snapgen_jax.networks.pruned import PrunedDecoderConfig, pruned
from tests.networks.tiny import drawn

SMOKE = AutoencoderConfig.preset("smoke", quantisation="convolutions", normalisation="measured")
WHOLE = build(SMOKE)[0]
decoded = jax.jit(functools.partial(apply, WHOLE, method="decode"))


def with_statistics(params):
    """Parameters whose latents are not normalised already."""
    return {**params, "statistics": {"bias": jnp.arange(4.0), "scale": 1 + jnp.arange(4.0)}}


@pytest.fixture(scope="module")
def params():
    return with_statistics(drawn(WHOLE))


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(3), (2, 4, 4, 4))


@pytest.mark.parametrize("preset", ["sd1", "sdxl", "sd3", "shapes", "smoke"])
def test_half_of_the_channels_are_a_quarter_of_the_parameters(preset):
    config = PrunedDecoderConfig.preset(preset)
    _, whole = build(config.autoencoder)
    _, spec = build(config)
    made = jax.eval_shape(lambda tree: pruned(config, tree), whole)
    assert {path: leaf.shape for path, leaf in flatten(made).items()} == {
        path: leaf.shape for path, leaf in flatten(spec).items()
    }
    assert 0.25 <= count_parameters(spec) / count_parameters(whole["decoder"]) <= 0.27


def test_the_decoder_of_stable_diffusion_keeps_12_of_its_49_million_parameters():
    config = PrunedDecoderConfig.preset("sd1")
    assert count_parameters(build(config.autoencoder)[1]["decoder"]) == 49_490_199
    assert count_parameters(build(config)[1]) == 12_387_479
    assert config.narrow.channels == (64, 128, 256, 256) and config.narrow.groups == 16


def test_a_pruning_that_keeps_all_decodes_as_the_autoencoder_does(params, latents):
    config = PrunedDecoderConfig(autoencoder=SMOKE, keep=1.0)
    made = jax.jit(functools.partial(apply, build(config)[0]))(pruned(config, params), latents)
    np.testing.assert_allclose(made, decoded(params, latents), atol=1e-6)


def test_channels_that_do_nothing_are_those_that_go(params, latents):
    """Where two of four groups are zero wherever they are made, a pruning to the other two changes nothing."""
    config = PrunedDecoderConfig(autoencoder=SMOKE, keep=0.5)

    def silenced(path, leaf):
        if path[0] != "decoder" or path[1] in ("quantisation", "conv_out") or path[-1] == "scale":
            return leaf
        group = jnp.arange(leaf.shape[-1]) // (leaf.shape[-1] // SMOKE.groups)
        return jnp.where((group == 0) | (group == 2), 0.0, leaf)

    def louder(path, leaf):
        """Attention divides by the root of the number of channels, silent ones too."""
        return leaf * 2**0.5 if path[-2] == "query" else leaf

    quiet = unflatten({path: silenced(path, leaf) for path, leaf in flatten(params).items()})
    whole = decoded(unflatten({path: louder(path, leaf) for path, leaf in flatten(quiet).items()}), latents)
    made = jax.jit(functools.partial(apply, build(config)[0]))(pruned(config, quiet), latents)
    np.testing.assert_allclose(made, whole, atol=1e-5)
    assert np.abs(whole).mean() > 0.01


@pytest.mark.parametrize(
    ("keep", "says"),
    [(0.3, "keep=0.3 of 4 groups is 1.2; whole groups stay"), (0.0, "keep=0.0 of 4"), (1.25, "keep=1.25 of 4")],
)
def test_a_share_that_is_no_number_of_groups_is_refused(keep, says):
    with pytest.raises(ValueError, match=says):
        PrunedDecoderConfig(autoencoder=SMOKE, keep=keep)


def test_weights_of_another_autoencoder_are_refused(params):
    other = dataclasses.replace(SMOKE, quantisation="none")
    with pytest.raises(ValueError, match="other layers than its config describes"):
        pruned(PrunedDecoderConfig(autoencoder=other), params)
