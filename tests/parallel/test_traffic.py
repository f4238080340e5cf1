"""What a program moves through memory, and what its loops compute, read from text."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from snapgen_jax.networks.attention_kernels import attend_by
from snapgen_jax.networks.eight_bits import product
from snapgen_jax.parallel.hlo import collectives
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.plan import _no_compilation_cache, topology
from snapgen_jax.parallel.traffic import _parse, _products, traffic

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
KIB = 1024

BY_HAND = """
%update (buffer: f32[8,256], part: f32[256], at: s32[]) -> f32[8,256] {
  %buffer = f32[8,256]{1,0} parameter(0)
  %part = f32[256]{0} parameter(1)
  %at = s32[] parameter(2)
  %row = f32[1,256]{1,0} bitcast(%part)
  %zero = s32[] constant(0)
  ROOT %put = f32[8,256]{1,0} dynamic-update-slice(%buffer, %row, %at, %zero)
}

%half (whole: f32[1024], other: f32[256]) -> f32[256] {
  %whole = f32[1024]{0} parameter(0)
  %other = f32[256]{0} parameter(1)
  %taken = f32[256]{0} slice(%whole), slice={[256:512]}
  ROOT %sum = f32[256]{0} add(%taken, %other)
}

%body (state: (s32[], f32[8,256], f32[256])) -> (s32[], f32[8,256], f32[256]) {
  %state = (s32[], f32[8,256]{1,0}, f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = f32[8,256]{1,0} get-tuple-element(%state), index=1
  %one = f32[256]{0} get-tuple-element(%state), index=2
  %put.1 = f32[8,256]{1,0} fusion(%all, %one, %i), kind=kLoop, calls=%update
  ROOT %next = (s32[], f32[8,256]{1,0}, f32[256]{0}) tuple(%i, %put.1, %one)
}

%more (state.1: (s32[], f32[8,256], f32[256])) -> pred[] {
  %state.1 = (s32[], f32[8,256]{1,0}, f32[256]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %eight = s32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %eight), direction=LT
}

ENTRY %main (x: f32[1024], y: f32[8,256]) -> f32[8,256] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %y = f32[8,256]{1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %fetch = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[1024]{0:T(1024)S(1)} copy-done(%fetch)
  %part.1 = ((f32[1024]{0:T(1024)}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:256]}
  %quarter = f32[256]{0:T(256)S(1)} slice-done(%part.1)
  %a = f32[256]{0:T(256)S(1)} fusion(%near, %quarter), kind=kLoop, calls=%half
  %b = f32[256]{0:T(256)} fusion(%x, %quarter), kind=kLoop, calls=%half
  %init = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}, f32[256]{0:T(256)}) tuple(%start, %y, %b)
  %loop = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}, f32[256]{0:T(256)}) while(%init), condition=%more, body=%body
  ROOT %out = f32[8,256]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_what_stays_on_the_chip_is_not_counted():
    fetched, taken = 4 * KIB, 1 * KIB  # each read once from memory
    sliced = 1 * KIB + 1 * KIB  # %b: a quarter of %x read, a result written; %a lives on the chip
    updated = 8 * (1 * KIB + 1 * KIB + 4)  # a row read and written, and the counter read, in each iteration
    assert traffic(BY_HAND).memory_bytes == fetched + taken + sliced + updated


def test_arrays_fill_whole_tiles():
    text = """
ENTRY %main (x: f32[3,5,200]) -> bf16[3,5,200] {
  %x = f32[3,5,200]{2,1,0:T(8,128)} parameter(0)
  ROOT %y = bf16[3,5,200]{0,2,1:T(8,128)(2,1)} convert(%x)
}
"""
    assert traffic(text).memory_bytes == 3 * 8 * 256 * 4 + 5 * 200 * 128 * 2


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        traffic("HloModule jit_f")


@needs_libtpu
def test_a_loop_is_counted_as_often_as_it_runs():
    """`tanh(x W) W` for eight matrices: x read, the result written, W fetched for each product."""
    place = SingleDeviceSharding(topology("v5e:2x2").devices[0])
    x = jax.ShapeDtypeStruct((8, 4096, 1024), jnp.bfloat16, sharding=place)
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=place)
    with _no_compilation_cache():
        compiled = jax.jit(lambda x, w: jax.lax.map(lambda x: jnp.tanh(x @ w) @ w, x)).lower(x, w).compile()
    found, once = traffic(str(compiled.as_text())), compiled.cost_analysis() or {}
    assert found.repeated_flops == 7 * 2 * (2 * 4096 * 1024 * 1024)
    assert once["flops"] == pytest.approx(2 * (2 * 4096 * 1024 * 1024), rel=0.01)
    assert found.memory_bytes == pytest.approx(8 * (2 * x.size // 8 * 2 + 2 * w.size * 2), rel=0.01)


@needs_libtpu
def test_products_of_int8_are_compiled_as_such_and_told_from_others():
    """Eight products of tokens in eight bits, and one of bfloat16, of the chip's own types."""
    place = SingleDeviceSharding(topology("v5e:2x2").devices[0])
    x = jax.ShapeDtypeStruct((8, 512, 1024), jnp.bfloat16, sharding=place)
    kernel = jax.ShapeDtypeStruct((1024, 1024), jnp.int8, sharding=place)
    scale = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=place)

    def run(x, kernel, scale):
        y = jax.lax.map(lambda x: product(x, kernel, scale, jnp.bfloat16), x)
        return y[0] @ y[1].T

    with _no_compilation_cache():
        compiled = jax.jit(run).lower(x, kernel, scale).compile()
    found = traffic(str(compiled.as_text()))
    assert found.int8_flops == 8 * 2 * 512 * 1024 * 1024


@needs_libtpu
def test_a_kernel_in_a_loop_is_counted_by_what_it_says_of_itself_as_often_as_it_runs():
    place = SingleDeviceSharding(topology("v5e:2x2").devices[0])
    x = jax.ShapeDtypeStruct((4, 1, 128, 2, 64), jnp.bfloat16, sharding=place)
    with _no_compilation_cache():
        attend = jax.jit(lambda x: jax.lax.map(lambda x: attend_by("flash", x, x, x), x))
        compiled = attend.lower(x).compile()
    found, once = traffic(str(compiled.as_text())), compiled.cost_analysis() or {}
    products = 2 * (2 * 2 * 128 * 128 * 64)
    assert found.repeated_flops == pytest.approx(3 * products, rel=0.05)
    assert once["flops"] == pytest.approx(products, rel=0.05)


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (lambda x, k: jnp.einsum("blhd,bmd->bhlm", x, k), ((2, 24, 4, 32), (2, 40, 32))),
        (lambda x, k: jnp.einsum("bhlm,bmhd->blhd", x, k), ((2, 4, 24, 40), (2, 40, 4, 32))),
        (
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            ((2, 16, 16, 32), (3, 3, 32, 64)),
        ),
    ],
)
@needs_libtpu
def test_products_are_most_of_what_xla_counts(operation, shapes):
    """Forward and backward, where XLA for TPU makes convolutions of everything; the rest is elementwise."""
    place = SingleDeviceSharding(topology("v5e:2x2").devices[0])
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    gradient = jax.jit(jax.grad(lambda x, k: jnp.square(operation(x, k)).sum(), (0, 1)))
    with _no_compilation_cache():
        compiled = gradient.lower(*given).compile()
    computations, entry = _parse(str(compiled.as_text()))
    assert 0.9 < _products(computations, computations[entry]) / (compiled.cost_analysis() or {})["flops"] <= 1


def test_a_collective_in_a_loop_is_counted_as_often_as_the_loop_runs():
    mesh = make_mesh(MeshConfig(data=8))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec(None, "data"), out_specs=PartitionSpec())
    def total(x):
        return jax.lax.map(lambda row: jnp.tanh(jax.lax.psum(row, "data")), x)

    x = jax.ShapeDtypeStruct((5, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "data")))
    found = collectives(total.lower(x).compile().as_text() or "")
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (5, 5 * 8 * 4)
