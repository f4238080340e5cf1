"""The kernel of a separable block, by the interpreter: what it computes, what it costs, and where it is used."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks import fused_separable as kernel
from snapgen_jax.networks.counting import macs
from snapgen_jax.networks.fused_separable import Norm, blocks, composed, cost, fused
from snapgen_jax.networks.layers import GroupNorm
from snapgen_jax.networks.module import apply, build, for_platform
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from snapgen_jax.parallel.plan import _no_compilation_cache, topology
from snapgen_jax.parallel.traffic import traffic


def arguments(shape, out, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    images, *_, channels = shape
    norm = Norm(normal(images, channels), 1 + normal(images, channels) / 9, normal(images, channels))
    weights = normal(1, 1, channels, out) / channels**0.5
    rest = normal(3, 3, 1, channels), normal(channels), weights, normal(images, out)
    return normal(*shape).astype(dtype), norm, *rest


def error(one, other):
    one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize(("shape", "out"), [((3, 8, 8, 16), 32), ((2, 4, 6, 24), 8), ((1, 12, 10, 8), 16)])
@pytest.mark.parametrize("budget", [kernel.BUDGET, 16 * 10 * 24 * 4])
def test_it_computes_what_the_operations_do(shape, out, budget, monkeypatch):
    """Whole images, several at a time, and strips of rows that need their neighbours."""
    monkeypatch.setattr(kernel, "BUDGET", budget)
    given = arguments(shape, out)
    assert error(fused(*given, True), composed(*given)) < 1e-6


def test_in_bfloat16_it_is_nearer_to_float32_than_the_operations_are():
    exact, given = arguments((2, 8, 8, 64), 64), arguments((2, 8, 8, 64), 64, jnp.bfloat16)
    expected = composed(given[0].astype(jnp.float32), *exact[1:])
    made = fused(*given, True)
    assert made.dtype == jnp.bfloat16
    assert error(made, expected) < error(composed(*given), expected) < 1e-2


def test_its_gradients_are_those_of_the_operations():
    given = arguments((2, 8, 8, 16), 8)

    def loss(run, *given):
        return jnp.sum(jnp.sin(run(*given)))

    found = jax.grad(functools.partial(loss, lambda *a: fused(*a, True)), argnums=range(6))(*given)
    expected = jax.grad(functools.partial(loss, composed), argnums=range(6))(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(one, other) < 1e-5


def test_a_batch_that_is_split_over_devices_is_computed_where_it_lies():
    mesh, given = make_mesh(MeshConfig(data=1, fsdp=-1)), arguments((8, 4, 4, 8), 8)
    split = batch_sharding(mesh)
    x = jax.device_put(given[0], split)
    with jax.set_mesh(mesh):
        made = jax.jit(lambda *given: fused(*given, True))(x, *given[1:])
    assert made.sharding.is_equivalent_to(split, 4)
    assert error(made, composed(*given)) < 1e-6


@pytest.mark.parametrize(
    ("side", "channels", "out", "taken"),
    [
        # the three stages at 256, 512 and 1024 px: of so many images, blocks of (images, rows)
        (32, 256, 512, (4, 32)), (16, 512, 1024, (8, 16)), (8, 896, 1792, (16, 8)),
        (64, 256, 512, (1, 64)), (32, 512, 1024, (2, 32)), (16, 896, 1792, (4, 16)),
        (128, 256, 512, (1, 32)), (64, 512, 1024, (1, 32)), (32, 896, 1792, (1, 32)),
    ],
)  # fmt: skip
def test_what_it_moves_and_computes_counted_by_hand(side, channels, out, taken):
    shape = (16, side, side, channels)
    images, rows = blocks(shape)
    assert (images, rows) == taken
    assert images * (rows + 2) * side * channels * 16 <= kernel.BUDGET < kernel.VMEM_LIMIT
    found = cost(shape, out, 2)
    strips = side // rows
    read = 16 * (side + (2 * strips if strips > 1 else 0)) * side * channels  # numbers, with the rows between strips
    written = 16 * side * side * out
    parameters = 2 * channels * out + 4 * (9 + 1) * channels + 4 * 16 * (3 * channels + out)
    assert found.bytes_accessed == 2 * (read + written) + parameters
    assert found.flops == 7 * read + 18 * 16 * side * side * channels + 2 * 16 * side * side * channels * out
    assert found.transcendentals == read
    assert read <= 1.0625 * 16 * side * side * channels


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(("chip", "side", "channels", "out"), [("v5e", 8, 896, 1792), ("v6e", 128, 256, 512)])
def test_it_compiles_for_a_chip_and_moves_there_what_it_says(chip, side, channels, out):
    """Whole images at 256 px, and strips of rows at 1024 px. Nothing is put aside in the device's memory."""
    place = jax.sharding.SingleDeviceSharding(topology(f"{chip}:2x2").devices[0])
    x, norm, kernel, bias, weights, offset = jax.eval_shape(
        lambda: arguments((4, side, side, channels), out, jnp.bfloat16)
    )
    weights = jax.ShapeDtypeStruct(weights.shape, jnp.bfloat16)  # their cast is another operation
    given = x, norm, kernel, bias, weights, offset
    given = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), given)
    with _no_compilation_cache():
        compiled = jax.jit(lambda *given: fused(*given)).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    moved = traffic(compiled.as_text()).memory_bytes
    assert moved == pytest.approx(cost(given[0].shape, out, 2).bytes_accessed, rel=0.1)


def test_the_coefficients_of_a_norm_are_what_it_does():
    norm, x = GroupNorm(12, 3), arguments((2, 4, 4, 12), 8)[0] + 5
    norm.scale[...], norm.bias[...] = jnp.linspace(1, 2, 12), jnp.linspace(-1, 1, 12)
    mean, gain, bias = (part[:, None, None] for part in norm.coefficients(x))
    np.testing.assert_allclose((x - mean) * gain + bias, norm(x), rtol=1e-5, atol=1e-6)


def kernels(config, platform):
    """How many kernels of another kind than XLA's a network has where it runs."""
    network, spec = build(for_platform(config, platform))
    step = jax.jit(lambda params, *given: apply(network, params, *given)[0])
    where = {"gpu": "cuda"}.get(platform, platform)
    text = step.trace(spec, *config.input_spec()).lower(lowering_platforms=(where,)).as_text()
    return text.count("tpu_custom_call")


def test_a_network_has_it_on_a_tpu_where_the_config_asks_for_it():
    asked = UNetConfig.preset("smoke", separable_block="fused")
    parts = {path[: path.index("conv_2")] for path in build(asked)[0].paths if "conv_2" in path}
    assert kernels(asked, "tpu") == 2 * len(parts) > 8
    assert kernels(asked, "gpu") == kernels(UNetConfig.preset("smoke"), "tpu") == 0


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_elsewhere_the_network_is_what_it_is_without(platform):
    plain, asked = UNetConfig.preset("smoke"), UNetConfig.preset("smoke", separable_block="fused")
    assert for_platform(asked, platform) == for_platform(plain, platform)


def test_it_is_counted_as_the_operations_are():
    plain, asked = UNetConfig.preset("smoke"), UNetConfig.preset("smoke", separable_block="fused")
    assert macs(asked, asked.input_spec()) == macs(plain, plain.input_spec())
