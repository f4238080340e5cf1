"""The patch discriminator: its size, its patches, and that nothing in it is idle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.patch_discriminator import PatchDiscriminatorConfig
from tests.networks.tiny import drawn, outputs_without_each_leaf


def test_it_has_the_published_size_and_gives_one_logit_a_patch():
    config = PatchDiscriminatorConfig()
    # 4 x 4 convolutions 3-64-128-256-512-1 with biases, and three norms
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert parameters(config) == kernels + (64 + 128 + 256 + 512 + 1) + 2 * (128 + 256 + 512) == 2_766_529
    network, spec = build(config)
    logits = jax.eval_shape(lambda p, x: apply(network, p, x), spec, *config.input_spec(2))
    assert logits.shape == (2, 30, 30, 1) and logits.dtype == jnp.float32


def test_every_parameter_has_an_effect():
    network, _ = build(PatchDiscriminatorConfig.preset("smoke"))
    params = drawn(network)
    x = jax.random.uniform(jax.random.key(0), (1, 16, 12, 3), minval=-1)
    whole = apply(network, params, x)
    for name, without in outputs_without_each_leaf(lambda p: apply(network, p, x), params).items():
        assert jnp.abs(without - whole).max() > 1e-6, f"{name} has no effect"


def test_an_example_is_judged_by_itself():
    network, _ = build(PatchDiscriminatorConfig.preset("smoke"))
    params = drawn(network)
    x = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3), minval=-1)
    np.testing.assert_allclose(apply(network, params, x)[1:2], apply(network, params, x[1:2]), atol=1e-5)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups=3 do not divide channels=8"):
        PatchDiscriminatorConfig(channels=8, groups=3)
