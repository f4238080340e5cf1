"""Random batches of any shapes: the same at every position, shared out over hosts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.synthetic import SyntheticBatches
from snapgen_jax.experiment import Experiment


def specs(height):
    return {
        "latent": jax.ShapeDtypeStruct((4, height, 8, 2), jnp.bfloat16),
        "tokens": jax.ShapeDtypeStruct((4, 5), jnp.int32),
        "mask": jax.ShapeDtypeStruct((4, 5), jnp.float32),
        "t5_mask": jax.ShapeDtypeStruct((4, 5), jnp.float32),
        "attention_mask": jax.ShapeDtypeStruct((4, 5), jnp.int32),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "image": jax.ShapeDtypeStruct((4, height, 8, 3), jnp.uint8),
    }


SPECS = {"a": specs(8), "b": specs(4)}
BOUNDS = {"tokens": 3, "label": 1}


def test_batches_have_the_shapes_that_are_asked_for_and_take_turns():
    drawn = list(itertools.islice(SyntheticBatches(SPECS, bounds=BOUNDS).batches(1), 3))
    assert [batch.bucket for batch in drawn] == ["b", "a", "b"]
    assert drawn[0] is drawn[2]
    for batch in drawn:
        for name, spec in SPECS[batch.bucket].items():
            assert (batch.arrays[name].shape, batch.arrays[name].dtype) == (spec.shape, spec.dtype)
        assert np.std(batch.arrays["latent"].astype(np.float32)) > 0.5


def test_every_array_is_drawn_within_its_meaning():
    arrays = next(SyntheticBatches(SPECS, bounds=BOUNDS).batches()).arrays
    for name in ("mask", "t5_mask", "attention_mask"):
        np.testing.assert_array_equal(arrays[name], np.ones(SPECS["a"][name].shape, SPECS["a"][name].dtype))
    assert set(arrays["tokens"].flat) == {0, 1, 2} and set(arrays["label"]) == {0}
    assert arrays["image"].max() > 200


def test_integers_that_nothing_is_said_of_are_refused():
    with pytest.raises(DataError, match="hold integers 'label', and nothing says which have a meaning"):
        SyntheticBatches(SPECS, bounds={"tokens": 3})


def test_a_run_says_how_many_words_and_classes_its_networks_know():
    labels = ["inputs.kind=class_labels", "inputs.label.classes=1", "inputs.label.width=16", "network.preset=smoke"]
    tokens = ["inputs.text.vocab_size=9"]
    drawn = []
    for changes in (labels, tokens):
        changes = ["data.source=synthetic", *changes, "network.latent_channels=48"]
        experiment = Experiment(load_experiment("configs/shapes/quickstart.py:runlocal", changes), "nowhere")
        drawn.append(next(experiment.data.batches(0)).arrays)
    assert set(drawn[0]["label"]) == {0} and set(drawn[1]["tokens"].flat) == set(range(9))


def test_each_host_has_its_own_share():
    shares = [next(SyntheticBatches(SPECS, bounds=BOUNDS, host_index=i, host_count=2).batches()) for i in range(2)]
    assert [list(share.source_index) for share in shares] == [[0, 1], [2, 3]]
    assert not np.array_equal(shares[0].arrays["tokens"], shares[1].arrays["tokens"])


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(DataError, match="global batch of 4 does not divide by the 3 hosts"):
        SyntheticBatches(SPECS, host_count=3)
