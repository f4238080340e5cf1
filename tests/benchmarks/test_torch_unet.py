"""The PyTorch port that our UNet is timed beside is our UNet: the same parameters, output and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import apply, build, flatten
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from tests.parity import draw, relative_error

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_to_compile")]

TOLERANCE = 5e-6
SMALL = {"channels": (32, 64, 96), "down_depth": (1, 1, 2), "mid_depth": 2, "up_depth": (0, 1, 1), "head_dim": 32}
WIDTHS = {"groups": 8, "context_width": 48, "pooled_width": 40, "time_width": 32, "embedding_width": 64}
# The text-to-image network in small, and the forms of the quickstart's.
CONFIGS = {
    "t2i": UNetConfig.preset("t2i", **SMALL, **WIDTHS),
    "quickstart": UNetConfig.preset(
        "shapes",
        **{**WIDTHS, "channels": (32, 32), "first_stage": "res", "mid": "rar", "down_depth": (0, 1), "units": 2},
        self_attention=(True, True),
        absolute_positions=True,
        sampler="sep",
        head_dim=16,
        kv_heads=2,
    ),
}


@pytest.fixture(scope="module")
def torch_unet():
    pytest.importorskip("torch")
    from benchmarks import torch_unet

    return torch_unet


def drawn(random, spec):
    """Parameters none of which is at its initial zero or one; the gains of norms are near one, as trained ones are."""

    def about_one(path, leaf):
        return leaf + 1 if path[-1].key == "scale" else leaf

    return jax.tree_util.tree_map_with_path(about_one, draw(random, spec))


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_equal_those_of_the_port(name, torch_unet):
    import torch

    config = CONFIGS[name]
    random, (network, spec) = np.random.default_rng(0), build(config)
    params, (batch, side, length) = drawn(random, spec), (2, 16, 13)
    x, target = random.standard_normal((2, batch, side, side, config.latent_channels), np.float32)
    t, mask = np.array([0.3, 0.8], np.float32), np.ones((batch, length), np.float32)
    mask[1, 9:] = 0
    sequence = random.standard_normal((batch, length, config.context_width), np.float32)
    pooled = random.standard_normal((batch, config.pooled_width), np.float32)

    def loss(params):
        features = time_features(jnp.asarray(t), config.time_width)
        context = TextContext(jnp.asarray(sequence), jnp.asarray(mask), jnp.asarray(pooled))
        v = apply(network, params, x, features, context)[0]
        return jnp.mean(jnp.square(v - target)), v

    grads, v = jax.jit(jax.grad(loss, has_aux=True))(params)

    model = torch_unet.UNet(torch_unet.fields_of(dataclasses.asdict(config)))
    model.load_state_dict(torch_unet.state_dict_of(flatten(params)))
    model.to(memory_format=torch.channels_last)
    model.place(side, side)

    def image(array):
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    features = torch_unet.time_features(torch.from_numpy(t), config.time_width)
    output = model(image(x), features, *(torch.from_numpy(array) for array in (sequence, mask, pooled)))
    (output - image(target)).square().mean().backward()

    assert relative_error(v, output.detach().permute(0, 2, 3, 1)) <= TOLERANCE
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = torch_unet.state_dict_of(flatten(grads))
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]}"


def test_every_parameter_of_the_full_size_has_its_place(torch_unet):
    import torch

    config = UNetConfig.preset("t2i")
    with torch.device("meta"):
        model = torch_unet.UNet(torch_unet.fields_of(dataclasses.asdict(config)))
    ours = flatten(build(config)[1])
    expected = {torch_unet.torch_name(path): torch_unet.torch_shape(path, leaf.shape) for path, leaf in ours.items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert len(expected) == len(ours) == 1046


def test_a_form_that_the_port_does_not_have_is_refused(torch_unet):
    with pytest.raises(ValueError, match="convolution='separable' only, not 'ordinary'"):
        torch_unet.fields_of(dataclasses.asdict(UNetConfig.preset("t2i", convolution="ordinary")))
