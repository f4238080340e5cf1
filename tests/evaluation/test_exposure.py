"""The evaluator of the exposure gap, of known distances."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.evaluation.exposure import Exposure
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.evaluation.registry import create

GENERATOR = types.SimpleNamespace(params={}, frozen={})


class Batches:
    def __iter__(self):
        for _ in range(3):
            yield types.SimpleNamespace(arrays={"x": np.ones(4)}, valid=np.array([True, True, True, False]))


def distances(params, frozen, arrays, key):
    noise = arrays["x"] * jnp.array([1.0, 1.0, 1.0, jnp.nan])  # what is not valid counts nowhere
    return {
        "noised/t=1.00": noise,
        "own/t=1.00": 9 * noise,
        "noised/t=0.90": 2 * noise,
        "own/t=0.90": 3 * noise,
        "noised/t=0.50": noise,
        "own/t=0.50": 2.5 * noise,
    }


def test_the_gap_is_the_mean_ratio_of_the_steps_after_the_first():
    numbers = Exposure(distances)(GENERATOR, Batches()).numbers
    assert numbers["exposure.own/t=0.90"] == pytest.approx(3)
    assert numbers["exposure.gap"] == pytest.approx((1.5 + 2.5) / 2)


def test_one_step_has_no_gap():
    def first(*arguments):
        return {name: value for name, value in distances(*arguments).items() if name.endswith("t=1.00")}

    with pytest.raises(ValueError, match="one step alone"):
        Exposure(first)(GENERATOR, Batches())


def test_it_needs_the_function_of_a_few_step_recipe_and_a_validation_split():
    with pytest.raises(ValueError, match="got none"):
        create(EvaluatorSpec("exposure"))
    with pytest.raises(ValueError, match="validation split"):
        Exposure(distances)(GENERATOR)
