"""The fence around nnx: parameters are a plain dict of named arrays, and a wrong dict is refused by name."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snapgen_jax.networks.layers import LayerNorm, Linear
from snapgen_jax.networks.module import (
    ParameterMismatchError,
    apply,
    build,
    compute_dtype,
    count_parameters,
    flatten,
    for_platform,
    init,
    shard,
    unflatten,
)
from snapgen_jax.networks.unet import UNetConfig
from tests.networks.tiny import drawn, inputs


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A few equal layers, so that a swap of two would go unseen."""

    width: int = 4
    layers: int = 12
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        return Stack(self, rngs)


class Stack(nnx.Module):
    def __init__(self, config: StackConfig, rngs: nnx.Rngs):
        self.layers = nnx.List([Linear(config.width, config.width, rngs=rngs) for _ in range(config.layers)])
        self.norm = LayerNorm(config.width)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.norm(x)

    def first(self, x):
        return self.layers[0](x)


X = jnp.linspace(-1, 1, 8).reshape(2, 4)


@functools.cache
def stack():
    network, spec = build(StackConfig())
    return network, spec, init(network, jax.random.key(0))


def test_a_network_is_built_from_shapes_and_initialised_from_a_key():
    network, spec, params = stack()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), spec
    )
    assert spec["layers"]["block_11"]["kernel"].shape == (4, 4)
    assert count_parameters(spec) == 12 * (16 + 4) + 8
    assert build(StackConfig())[0] is network and hash(network) == hash(build(StackConfig())[0])
    other = init(network, jax.random.key(1))
    assert (other["layers"]["block_00"]["kernel"] != params["layers"]["block_00"]["kernel"]).all()
    assert (params["layers"]["block_00"]["kernel"] != params["layers"]["block_01"]["kernel"]).all()
    again = init(network, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_init_draws_what_nnx_would_draw():
    _, _, params = stack()
    module = StackConfig().module(nnx.Rngs(jax.random.key(0)))
    np.testing.assert_array_equal(params["layers"]["block_07"]["kernel"], module.layers[7].kernel[...])


def test_apply_equals_the_module_itself_and_reaches_its_methods():
    network, _, params = stack()
    module = StackConfig().module(nnx.Rngs(jax.random.key(0)))
    np.testing.assert_array_equal(apply(network, params, X), module(X))
    np.testing.assert_array_equal(apply(network, params, X, method="first"), module.first(X))


def test_the_order_of_the_dict_does_not_matter_beyond_ten_blocks():
    network, _, params = stack()
    flat = flatten(params)
    reversed_tree = unflatten(dict(reversed(flat.items())))
    np.testing.assert_array_equal(apply(network, reversed_tree, X), apply(network, params, X))
    sorted_by_jax = jax.tree.map(lambda leaf: leaf, params)  # tree.map sorts the keys of a dict
    np.testing.assert_array_equal(apply(network, sorted_by_jax, X), apply(network, params, X))


def test_renamed_missing_and_surplus_parameters_are_refused_by_name():
    network, _, params = stack()
    flat = flatten(params)
    renamed = {tuple("gain" if part == "scale" else part for part in path): leaf for path, leaf in flat.items()}
    with pytest.raises(ParameterMismatchError, match=r"missing: norm/scale.*\n.*surplus: norm/gain"):
        apply(network, unflatten(renamed), X)
    flat.pop(("layers", "block_03", "bias"))
    flat["layers", "block_12", "bias"] = jnp.zeros(4)
    with pytest.raises(ParameterMismatchError) as error:
        apply(network, unflatten(flat), X)
    message = str(error.value)
    assert "StackConfig" in message
    assert "missing: layers/block_03/bias" in message and "surplus: layers/block_12/bias" in message


def test_a_network_may_hold_parameters_only():
    @dataclasses.dataclass(frozen=True)
    class Dropping:
        def module(self, rngs: nnx.Rngs) -> nnx.Module:
            return nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    with pytest.raises(TypeError, match=r"nnx\.Param only"):
        build(Dropping())


def test_the_platform_fixes_what_is_automatic_and_nothing_else():
    @dataclasses.dataclass(frozen=True)
    class Outer:
        unet: Any = UNetConfig.preset("smoke")
        depthwise: Literal["auto", "grouped", "shifted"] = "grouped"
        name: str = "auto"

    cpu, gpu, tpu = (for_platform(Outer(), platform) for platform in ("cpu", "gpu", "tpu"))
    assert (cpu.unet.dtype, cpu.unet.depthwise) == ("float32", "shifted")
    assert (gpu.unet.dtype, gpu.unet.depthwise) == ("bfloat16", "flipped")
    assert (tpu.unet.dtype, tpu.unet.depthwise) == ("bfloat16", "grouped")
    assert (cpu.depthwise, cpu.name) == ("grouped", "auto")
    assert for_platform(tpu, "cpu") == tpu, "a choice once made stays"
    assert compute_dtype(UNetConfig()) == jnp.float32 and compute_dtype(tpu.unet) == jnp.bfloat16


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))


def test_shard_is_the_identity_outside_a_mesh_and_splits_the_batch_inside():
    x = jnp.arange(48.0).reshape(8, 3, 2)
    assert shard(x) is x
    with jax.set_mesh(mesh()):
        y = jax.jit(lambda x: shard(x + 0))(x)
    np.testing.assert_array_equal(y, x)
    assert [s.data.shape for s in y.addressable_shards] == [(1, 3, 2)] * 8


def test_eight_devices_compute_what_one_does():
    """Loss and gradient of a batch of eight, split over the devices, with nothing else changed."""
    one_stage = {"channels": (8,), "down_depth": (1,), "mid_depth": 0, "up_depth": (0,), "cross_attention": (True,)}
    config = UNetConfig.preset("smoke", depthwise="shifted", self_attention=(True,), **one_stage)
    network, _ = build(config)
    params, (x, time, context) = drawn(network), inputs(config, batch=8)

    def loss(params, x, time, context):
        v, _ = apply(network, params, x, time, context)
        return jnp.mean(jnp.square(v - x))

    step = jax.value_and_grad(loss)
    one = jax.jit(step)(params, x, time, context)
    split = NamedSharding(mesh(), PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh()):
        eight = jax.jit(step)(params, *jax.device_put((x, time, context), split))
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
