"""Validation loss: fixed batches, fixed noise, averages over valid examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.evaluation.validation_loss import ValidationLoss


@dataclasses.dataclass
class Batch:
    arrays: dict
    valid: np.ndarray


class Validation:
    """Endless, as a pipeline is."""

    def __init__(self, batches):
        self.kept = batches

    def __iter__(self):
        while True:
            yield from self.kept


class Run:
    params, frozen = {"scale": jnp.float32(2.0)}, {}


def batch(*values, valid=None):
    return Batch(
        {"x": np.asarray(values, np.float32)}, np.ones(len(values), bool) if valid is None else np.array(valid)
    )


def scaled(params, frozen, arrays, key):
    return {"mean": params["scale"] * arrays["x"], "constant": jnp.float32(3.0)}


def noisy(params, frozen, arrays, key):
    return {"mean": jax.random.normal(key, arrays["x"].shape)}


def test_losses_are_averaged_over_the_examples_of_all_batches():
    result = ValidationLoss(scaled, batches=2)(Run(), Validation([batch(1, 2), batch(3, 6)]))
    assert result.numbers == pytest.approx({"validation_loss.mean": 6.0, "validation_loss.constant": 3.0})


def test_replaced_examples_do_not_count_even_if_their_loss_is_not_a_number():
    data = Validation([batch(1, np.nan, valid=[True, False]), batch(3, 5)])
    assert ValidationLoss(scaled, batches=2)(Run(), data).numbers["validation_loss.mean"] == pytest.approx(6.0)


def test_noise_is_fixed_by_seed_and_batch():
    data = Validation([batch(*range(4))])
    first, again = (ValidationLoss(noisy, batches=1)(Run(), data).numbers for _ in range(2))
    other = ValidationLoss(noisy, batches=1, seed=1)(Run(), data).numbers
    two = ValidationLoss(noisy, batches=2)(Run(), data).numbers  # the same batch again, with noise of its own
    assert first == again
    assert first != other and first != two


def test_the_function_is_compiled_once_for_a_run():
    traces = []

    def counted(params, frozen, arrays, key):
        traces.append(1)
        return scaled(params, frozen, arrays, key)

    evaluator = ValidationLoss(counted, batches=3)
    for _ in range(2):
        evaluator(Run(), Validation([batch(1, 2)]))
    assert len(traces) == 1


def test_the_iterator_is_closed():
    closed = []

    class Watched(Validation):
        def __iter__(self):
            try:
                yield from super().__iter__()
            finally:
                closed.append(True)

    ValidationLoss(scaled, batches=1)(Run(), Watched([batch(1)]))
    assert closed


def test_no_valid_example_is_an_error():
    with pytest.raises(ValueError, match="no valid example"):
        ValidationLoss(scaled, batches=1)(Run(), Validation([batch(1, valid=[False])]))
    with pytest.raises(ValueError, match="validation split"):
        ValidationLoss(scaled)(Run())
