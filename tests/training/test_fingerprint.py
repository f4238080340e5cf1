"""A fingerprint knows every bit of a tree, and nothing of where it lies."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training.fingerprint import fingerprint

TREE = {f"layer_{i}": np.arange(i, i + 32, dtype=np.float32).reshape(2, 16) for i in range(200)}


def test_a_tree_of_many_arrays_has_one_fingerprint_on_one_device_and_split_over_eight():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split = jax.device_put(TREE, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    assert fingerprint(split) == fingerprint(TREE)


def negated(x):
    return x | {"layer_7": np.where(x["layer_7"] == 9, -x["layer_7"], x["layer_7"])}


@pytest.mark.parametrize(
    "change",
    [
        negated,
        lambda x: x | {"layer_7": x["layer_7"][::-1]},
        lambda x: x | {"layer_7": x["layer_8"], "layer_8": x["layer_7"]},
        lambda x: x | {"layer_7": x["layer_7"].reshape(4, 8)},
        lambda x: x | {"layer_7": x["layer_7"].view(np.int32)},
    ],
    ids=["a sign", "an order", "two names", "a shape", "a dtype"],
)
def test_it_changes_with(change):
    assert fingerprint(change(TREE)) != fingerprint(TREE)


def test_a_role_with_slashes_counts_as_nested():
    a, b, c, d = (TREE[f"layer_{i}"] for i in range(4))
    flat = {"teacher/text": {"kernel": a}, "teacher/mmdit": {"kernel": b}, "text": c, "codec/decoder": d}
    nested = {"teacher": {"text": {"kernel": a}, "mmdit": {"kernel": b}}, "text": c, "codec": {"decoder": d}}
    assert fingerprint(flat) == fingerprint(nested)
    assert fingerprint({"teacher_text": a}) != fingerprint({"teacher/text": a}) != fingerprint({"text": a})


def test_of_nothing_it_is_empty():
    assert fingerprint({}) == ""
