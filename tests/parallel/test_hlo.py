"""Collectives read from program text: counts, bytes, and what passes over the links."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from snapgen_jax.parallel.hlo import ACROSS, Collective, collectives
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh

LINES = """
ENTRY %main (a: f32[1024,8]) -> f32[8] {
  %all-reduce.1 = f32[1024,8]{1,0} all-reduce(%a), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %all-gather.1 = bf16[64,32]{1,0} all-gather(%b), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %ag = (bf16[16,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%b), replica_groups={{0,1,2,3},{4,5,6,7}}
  %agd = bf16[64,32]{1,0} all-gather-done(%ag)
  %rs = f32[16]{0} reduce-scatter(%c), replica_groups={{0,1,2,3}}, dimensions={0}
  %cp = u32[10]{0} collective-permute(%d), source_target_pairs={{0,1},{1,0}}
  %m = f32[8]{0} all-reduce(%d), replica_groups=mesh['a'=4,'b'=2,'c'=4] {'a','c':(1)2}, to_apply=%add
  %fusion.1 = f32[8] fusion(%e), calls=%all-reduce-like
}
"""


def test_kinds_counts_and_bytes():
    found = collectives(LINES)
    assert found["all-reduce"] == Collective(2, 32768 + 32, 2 * (32768 + 32) * 7 // 8)
    # An asynchronous one is counted at its start, by its result, and not again when it is done.
    assert found["all-gather"] == Collective(2, 2 * 4096, 2 * 3072)
    assert found["reduce-scatter"] == Collective(1, 64, 192)
    assert found["collective-permute"] == Collective(1, 40, 40)
    assert len(found) == 4


def test_what_a_device_sends_to_other_slices_is_a_kind_of_its_own():
    sent = (
        "  %send.1 = (bf16[2,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%a, %b), channel_id=4, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %done = token[] send-done(%send.1), channel_id=4\n"
    )
    found = collectives(LINES.rstrip().removesuffix("}") + sent + "}\n", slices=4)
    assert found[ACROSS] == Collective(1, 4096, 4096 * 2 * 3 // 4)
    assert found["all-reduce"] == collectives(LINES)["all-reduce"]


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        # As a TPU's compiler names the shares of a mesh of data=16 x fsdp=16.
        ("mesh['axis_0'=16,'axis_1'=1,'axis_2'=16], device_ids=([16,16]T(1,0)) {'axis_0'}", 16),
        ("{}", 32),
        ("a form of tomorrow", 32),
    ],
)
def test_groups_of_devices_are_read_in_each_form_that_compilers_write(groups, devices, caplog):
    line = f"  %g = f32[1024] all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}\n"
    found = collectives(f"HloModule jit_f, num_partitions=32, is_scheduled=true\n\nENTRY %main {{\n{line}}}\n")
    assert found == {"all-gather": Collective(1, 4096, 4096 * (devices - 1) // devices)}
    assert ("a form of tomorrow" in caplog.text) == ("tomorrow" in groups)


@pytest.mark.parametrize(("axes", "kind"), [({"data": 8}, "all-reduce"), ({"data": 1, "fsdp": 8}, "all-gather")])
def test_what_a_real_program_sends(axes, kind):
    """A sum over 8 devices of gradients `[64, 32]`, and a parameter of that shape gathered from 8 shares."""
    mesh = make_mesh(MeshConfig(**axes))
    share = PartitionSpec("fsdp", None) if "fsdp" in axes else PartitionSpec()
    weights = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, share))
    batch = jax.device_put(jnp.ones((16, 64)), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.square(x @ w).sum()), out_shardings=NamedSharding(mesh, share))
    found = collectives(gradient.lower(weights, batch).compile().as_text())
    assert found[kind].bytes == 64 * 32 * 4
    assert found[kind].wire_bytes == (2 if kind == "all-reduce" else 1) * 64 * 32 * 4 * 7 // 8
