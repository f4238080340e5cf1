"""Random batches of any shapes: the same at every position, shared out over hosts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.synthetic import SyntheticBatches


def specs(height):
    return {
        "latent": jax.ShapeDtypeStruct((4, height, 8, 2), jnp.bfloat16),
        "tokens": jax.ShapeDtypeStruct((4, 5), jnp.int32),
        "mask": jax.ShapeDtypeStruct((4, 5), jnp.float32),
        "t5_mask": jax.ShapeDtypeStruct((4, 5), jnp.float32),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
    }


SPECS = {"a": specs(8), "b": specs(4)}


def test_batches_have_the_shapes_that_are_asked_for_and_take_turns():
    drawn = list(itertools.islice(SyntheticBatches(SPECS).batches(1), 3))
    assert [batch.bucket for batch in drawn] == ["b", "a", "b"]
    assert drawn[0] is drawn[2]
    for batch in drawn:
        for name, spec in SPECS[batch.bucket].items():
            assert (batch.arrays[name].shape, batch.arrays[name].dtype) == (spec.shape, spec.dtype)
        assert (batch.arrays["mask"] == 1).all() and (batch.arrays["t5_mask"] == 1).all()
        assert set(batch.arrays["label"]) <= {0, 1}, "every model of classes has two"
        assert np.std(batch.arrays["latent"].astype(np.float32)) > 0.5


def test_each_host_has_its_own_share():
    shares = [next(SyntheticBatches(SPECS, host_index=i, host_count=2).batches()) for i in range(2)]
    assert [list(share.source_index) for share in shares] == [[0, 1], [2, 3]]
    assert not np.array_equal(shares[0].arrays["tokens"], shares[1].arrays["tokens"])


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(DataError, match="global batch of 4 does not divide by the 3 hosts"):
        SyntheticBatches(SPECS, host_count=3)
