"""Drawing from a trained run."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import experiment
from snapgen_jax.config import load_config
from snapgen_jax.experiment import prepare_workdir
from snapgen_jax.training.exits import ConfigError
from tests.recipes_for_tests import Adds, adder


def test_a_generator_with_other_weights_draws_with_them_and_compiles_nothing_new(monkeypatch):
    monkeypatch.setattr(Adds, "traced", 0)
    made = adder(2, 10)
    other = made.with_weights(jnp.int32(3), jnp.int32(20))
    assert made.generate(["1", "2"]).ravel().tolist() == [12, 14]
    assert other.generate(["1", "2"]).ravel().tolist() == [23, 26]
    assert made.generate(["1", "2"]).ravel().tolist() == [12, 14] and Adds.traced == 1


def test_a_run_is_evaluated_with_the_generator_that_is_given(tmp_path):
    class Draws:
        recipe = types.SimpleNamespace(evaluators=list)

        def generate(self, prompts, **options):
            self.asked = prompts, options
            return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    prepare_workdir(load_config("configs/shapes/quickstart.py:runlocal", ["data.source=synthetic"]), tmp_path)
    given, asked = Draws(), {"sample_grid": {"prompts": ("a ring",)}}
    options = {"generation": {"steps": 4}, "options": asked}
    experiment.evaluate(tmp_path, ["sample_grid"], **options, generator=given)  # type: ignore[arg-type]
    assert given.asked == (["a ring"], {"seed": 0, "steps": 4}) and (tmp_path / "samples" / "samples.png").exists()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        experiment.evaluate(tmp_path, ["sample_grid"], **options)
