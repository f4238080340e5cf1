"""The stored bases that the claims of papers start from."""

import json

import numpy as np
import pytest

import snapgen_jax
from benchmarks.bases import BASES, halved, names


@pytest.mark.parametrize("name", names())
def test_a_base_is_small_says_where_it_is_from_and_loads(name):
    folder = BASES / name
    record = json.loads((folder / "base.json").read_text())
    assert record["command"].startswith("snapgen train --config=configs/") and record["machine"] and record["commit"]
    (number,) = (value for key, value in record.items() if "." in key)
    assert 0 < number <= 1
    params = snapgen_jax.load(str(folder)).params
    leaves = [x for player in params.values() for x in _leaves(player)]
    assert sum(x.size for x in leaves) == record["parameters"] and {str(x.dtype) for x in leaves} == {"float32"}


def test_all_bases_take_eight_megabytes_at_most():
    assert names() and sum(file.stat().st_size for file in BASES.rglob("*")) <= 8e6


def test_values_that_half_precision_cannot_hold_are_refused_by_name():
    kept = halved({"a": np.float32([1.0]), "n": np.int32([7])})
    assert kept["a"].dtype == np.float16 and kept["n"].dtype == np.int32
    with pytest.raises(ValueError, match="wide: values beyond"):
        halved({"a": np.float32([1.0]), "wide": np.float32([7e4])})


def _leaves(tree):
    return [x for value in tree.values() for x in _leaves(value)] if isinstance(tree, dict) else [tree]
