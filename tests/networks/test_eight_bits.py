"""Products in eight bits: their sums by hand, how far they are from the exact ones, and the networks that use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from snapgen_jax.networks.counting import count_macs_by_dtype
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.eight_bit_network import EightBitConfig, as_trained
from snapgen_jax.networks.eight_bits import DTYPES, SCALE, product, quantise, quantise_kernel
from snapgen_jax.networks.lora import merge
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import ParameterMismatchError, apply, build, flatten, for_platform, frozen_spec
from snapgen_jax.networks.registry import DenoiserConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights.frozen import in_eight_bits
from tests.networks.tiny import drawn, inputs
from tests.recipes_for_tests import ONE_STAGE

FORMATS = ("int8", "fp8")
CONFIGS = {
    "mmdit": MMDiTConfig.preset("smoke", depth=2, dual=0),
    "dit": DiTConfig.preset("smoke", depth=1),
    "unet": UNetConfig.preset("smoke", **ONE_STAGE),
}
# Layers that compute in eight bits, by the ends of their paths; everything else keeps the dtype.
ROUNDED = {
    "mmdit": {"query", "key", "value", "back", "inner", "outer"},
    "dit": {"query", "key", "value", "back", "inner", "outer"},
    "unet": {"query", "key", "value", "out", "inner", "outer", "project_in", "project_out"},
}


def case(form, seed=0, rows=24, width=96, out=40):
    """Tokens of very different sizes, a kernel of very different channels, and it in eight bits."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, rows, width)) * np.exp(rng.normal(size=(2, rows, 1)))
    kernel = rng.normal(size=(width, out)) * np.exp(rng.normal(size=out))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    return x, kernel, *quantise_kernel(kernel, form)


@pytest.mark.parametrize("form", FORMATS)
def test_a_product_is_the_scaled_sum_of_rounded_numbers(form):
    x, kernel, rounded, scale = case(form)
    assert (rounded.dtype, scale.dtype, scale.shape) == (DTYPES[form], jnp.float32, (40,))
    largest = {"int8": 127, "fp8": 448}[form]
    r = np.abs(x).max(axis=-1, keepdims=True) / largest
    np.testing.assert_allclose(scale, np.abs(kernel).max(axis=0) / largest, rtol=1e-6)
    rows = np.asarray(x, np.float64) / r
    rows = np.rint(rows) if form == "int8" else np.asarray(jnp.asarray(rows, jnp.float8_e4m3fn), np.float64)
    expected = (rows @ np.asarray(rounded, np.float64)) * r * np.asarray(scale)
    found = jax.jit(product, static_argnums=3)(x, rounded, scale, jnp.float32)
    # A quotient that lies between two integers may be rounded to either: one step of one number.
    step = (r * np.abs(np.asarray(rounded, np.float64)).max() * np.asarray(scale)) * (1 if form == "int8" else 32)
    assert (np.abs(found - expected) <= step * 1.01 + 1e-5).all()
    assert np.mean(np.abs(found - expected) < 1e-5 * np.abs(expected).max(axis=-1, keepdims=True)) > 0.95


@pytest.mark.parametrize("form", FORMATS)
def test_the_error_is_within_what_rounding_allows(form):
    x, kernel, rounded, scale = case(form, seed=1)
    x64, k64 = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    r = np.abs(x64).max(axis=-1, keepdims=True) / {"int8": 127, "fp8": 448}[form]
    s = np.asarray(scale, np.float64)
    if form == "int8":  # half a step of each factor
        dx, dk = np.broadcast_to(r / 2, x64.shape), np.broadcast_to(s / 2, k64.shape)
    else:  # three bits of mantissa, and steps of 2^-9 below 2^-6
        dx, dk = (np.maximum(2.0**-4 * np.abs(a), 2.0**-10 * b) for a, b in ((x64, r), (k64, s)))
    bound = np.abs(x64) @ dk + dx @ np.abs(k64) + dx @ dk
    error = np.abs(np.asarray(product(x, rounded, scale, jnp.float32), np.float64) - x64 @ k64)
    assert (error <= 1.001 * bound).all() and error.max() > 0
    relative = np.linalg.norm(error) / np.linalg.norm(x64 @ k64)
    assert relative < {"int8": 0.015, "fp8": 0.05}[form]


@pytest.mark.parametrize("form", FORMATS)
def test_a_token_and_a_channel_have_scales_of_their_own(form):
    x, kernel, rounded, scale = case(form)
    y = product(x, rounded, scale, jnp.float32)
    louder = x.at[0, 3].multiply(1024.0)
    np.testing.assert_array_equal(product(louder, rounded, scale, jnp.float32), y.at[0, 3].multiply(1024.0))
    again, its_scale = quantise_kernel(kernel.at[:, 5].multiply(1024.0), form)
    np.testing.assert_array_equal(product(x, again, its_scale, jnp.float32), y.at[..., 5].multiply(1024.0))
    np.testing.assert_array_equal(quantise_kernel(jnp.stack([kernel, kernel]), form)[0][1], rounded)


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zeros(form):
    x, kernel, *_ = case(form)
    values, scales = quantise(x.at[0, 0].set(0), -1, DTYPES[form])
    assert not values[0, 0].astype(jnp.float32).any() and float(scales[0, 0, 0]) == 1
    y = product(x.at[0, 0].set(0), *quantise_kernel(kernel.at[:, 0].set(0), form), jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and np.isfinite(y.astype(jnp.float32)).all()
    assert not y[0, 0].any() and not y[..., 0].any()


@pytest.mark.parametrize(("form", "sums"), [("int8", "int32"), ("fp8", "float32")])
def test_what_is_multiplied_has_eight_bits_and_what_is_summed_has_thirty_two(form, sums):
    x, _, rounded, scale = case(form)
    lowered = jax.jit(product, static_argnums=3).lower(x.astype(jnp.bfloat16), rounded, scale, jnp.bfloat16)
    (line,) = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    operand, result = {"int8": ("i8", "i32"), "fp8": ("f8E4M3FN", "f32")}[form]
    assert f"x{operand}>, tensor<96x40x{operand}>) -> tensor<2x24x40x{result}>" in line
    assert dict(count_macs_by_dtype(lambda x: product(x, rounded, scale, jnp.float32), x)) == {
        str(np.dtype(DTYPES[form])): 2 * 24 * 96 * 40
    }
    # 9,728 inputs of the largest numbers, as in the widest layer of Stable Diffusion 3.5 Large
    ones = jnp.ones((1, 9728))
    assert float(product(ones, *quantise_kernel(ones.T, form), jnp.float32)[0, 0]) == pytest.approx(9728, rel=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_the_derivative_is_that_of_the_float_product_and_the_kernel_has_none(form):
    x, _, rounded, scale = case(form)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 24, 40)), jnp.float32)

    def loss(x, scale):
        return jnp.sum(weights * product(x, rounded, scale, jnp.float32))

    dx, dscale = jax.jit(jax.grad(loss, (0, 1)))(x, scale)
    np.testing.assert_allclose(dx, weights @ (rounded.astype(jnp.float32) * scale).T, rtol=1e-4, atol=1e-3)
    assert not dscale.any()


# --- networks ---


@functools.cache
def pair(name, form):
    """A network and its parameters, and the same in eight bits."""
    config = for_platform(CONFIGS[name], "cpu")
    network, rounded = build(config)[0], build(EightBitConfig(config, form))[0]
    params = drawn(network)
    return network, params, rounded, in_eight_bits(params, rounded)


@functools.cache
def outputs(name, form):
    """The velocity, the first and the last feature of both, for the same inputs."""
    network, params, rounded, params_8 = pair(name, form)
    given, names = inputs(network.config, 4, 8, 8, 5), network.config.tap_names()
    both = ((network, params), (rounded, params_8))
    return [jax.jit(lambda p, net=net: apply(net, p, *given, taps=(names[0], names[-1])))(tree) for net, tree in both]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layers_of_tokens_are_rounded_and_nothing_else_is(name):
    network, params, rounded, params_8 = pair(name, "int8")
    assert as_trained(rounded) == network and rounded.config.kind == name == network.config.kind
    before, after = flatten(params), flatten(params_8)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), frozen_spec(rounded)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params_8
    )
    kernels = {path for path in before if path[-1] == "kernel" and (*path[:-1], SCALE) in after}
    assert {path[-2] for path in kernels} == ROUNDED[name]
    assert after.keys() - before.keys() == {(*path[:-1], SCALE) for path in kernels}
    for path, leaf in before.items():
        if path in kernels:
            step = np.asarray(after[*path[:-1], SCALE])[..., None, :]
            assert after[path].dtype == jnp.int8 and not {"modulation", "time", "pooled", "patch"} & set(path)
            assert (np.abs(np.asarray(after[path], np.float32) * step - leaf) <= 0.501 * step).all()
        else:
            np.testing.assert_array_equal(after[path], leaf)


@pytest.mark.parametrize(("name", "form"), [(name, "int8") for name in CONFIGS] + [("mmdit", "fp8")])
def test_outputs_and_features_are_near_those_of_the_network_as_it_was_trained(name, form):
    network, params, rounded, _ = pair(name, form)
    assert rounded.config.tap_names() == network.config.tap_names()
    (v, taps), (v_8, taps_8) = outputs(name, form)
    for i, exact, near in ((0, v, v_8), *((i, taps[i], taps_8[i]) for i in taps)):
        error = float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact))
        # What comes before the first transformer of a UNet, and what enters the first attention.
        none = i == network.config.tap_names()[0]
        assert near.dtype == exact.dtype and (error == 0) == none
        assert error < {"int8": 0.04, "fp8": 0.12}[form]
    with pytest.raises(ParameterMismatchError, match="kernel_scale"):
        apply(rounded, params, *inputs(network.config))


@pytest.mark.parametrize("name", CONFIGS)
def test_as_many_multiply_adds_of_which_most_of_a_transformers_are_int8(name):
    network, params, rounded, params_8 = pair(name, "int8")
    given = inputs(network.config, 2, 8, 8, 5)
    before, after = (
        count_macs_by_dtype(lambda p, net=net: apply(net, p, *given), tree)
        for net, tree in ((network, params), (rounded, params_8))
    )
    assert set(before) == {"float32"} and set(after) == {"float32", "int8"}
    assert after.total() == before.total()


@pytest.mark.parametrize("name", CONFIGS)
def test_scales_lie_where_the_outputs_of_their_kernels_do(name):
    _, _, rounded, _ = pair(name, "int8")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    places = flatten(tree_shardings(frozen_spec(rounded), rounded.config.rules(), mesh))
    split = 0
    for path, place in places.items():
        if path[-1] == SCALE:
            kernel = flatten(frozen_spec(rounded))[*path[:-1], "kernel"]
            of_kernel = (*places[*path[:-1], "kernel"].spec, *[None] * len(kernel.shape))[: len(kernel.shape)]
            of_scale = (*place.spec, *[None] * len(kernel.shape))[: len(kernel.shape) - 1]
            assert of_scale == (*of_kernel[:-2], of_kernel[-1]), path
            split += of_kernel[-1] is not None
    assert split > 3


@pytest.mark.parametrize("form", FORMATS)
def test_a_product_over_inputs_that_are_split_takes_the_scale_of_the_whole_token(form):
    x, _, rounded, scale = case(form)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    spread = [
        jax.device_put(given, NamedSharding(mesh, PartitionSpec(*axes)))
        for given, axes in ((x, (None, None, "tensor")), (rounded, ("tensor", "fsdp")), (scale, ("fsdp",)))
    ]
    run = jax.jit(product, static_argnums=3)
    alone = np.asarray(run(x, rounded, scale, jnp.float32))
    tolerance = {"int8": 0, "fp8": 1e-5 * np.abs(alone).max()}[form]  # sums of integers are exact in any order
    np.testing.assert_allclose(run(*spread, jnp.float32), alone, rtol=0, atol=tolerance)


def test_rounded_on_a_mesh_it_is_the_network_that_it_is_on_one_device():
    network, params, rounded, params_8 = pair("mmdit", "int8")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, tree_shardings(params, network.config.rules(), mesh))
    split = in_eight_bits(placed, rounded, mesh)
    jax.tree.map(np.testing.assert_array_equal, split, params_8)
    expected = tree_shardings(frozen_spec(rounded), rounded.config.rules(), mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), split, expected))
    given = inputs(network.config, 4, 8, 8, 5)
    alone = np.asarray(outputs("mmdit", "int8")[1][0])
    with jax.set_mesh(mesh):
        v, _ = jax.jit(lambda p, *given: apply(rounded, p, *given))(split, *given)
    # A sum in another order may round a token's number to the next integer, and most are as they were.
    assert np.linalg.norm(v - alone) < 0.01 * np.linalg.norm(alone)
    assert np.mean(np.abs(v - alone) < 1e-4 * np.abs(alone).max()) > 0.5


def test_every_denoiser_says_which_layers_and_an_adapter_is_refused():
    named = {config.__name__ for config in DenoiserConfig.__args__ if config.EIGHT_BITS}
    assert named == {"MMDiTConfig", "DiTConfig", "UNetConfig"}
    _, _, _, params_8 = pair("mmdit", "int8")
    query = {"lora_A": jnp.ones((2, 16)), "lora_B": jnp.ones((16, 2))}
    adapter = {"last_block": {"image": {"attention": {"query": {"kernel": query}}}}}
    with pytest.raises(ValueError, match="last_block/image/attention/query/kernel is in eight bits"):
        merge({"mmdit": params_8}, {"mmdit": adapter}, 1.0)
