"""How far a cheaper way of sampling leads from the full one."""

import numpy as np
import pytest

from snapgen_jax.evaluation.deviation import Deviation
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.evaluation.registry import create


class Draws:
    """A generator whose pixels are a tenth of the prompt's number brighter for each step that is left out of ten."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, *, seed=0, indices=None, steps=10, guidance=1.0):
        self.asked.append((seed, steps, guidance))
        values = [255 * (10 - steps) / 10 * int(prompt) / 10 for prompt in prompts]
        return np.stack([np.full((4, 4, 3), value, np.uint8) for value in values])


def test_it_is_the_root_mean_squared_difference_from_the_same_generator_under_the_reference_options():
    generator = Draws()
    options = {"steps": 5, "guidance": 2.0}
    found = create(
        EvaluatorSpec(
            "deviation", options={"reference": {"steps": 10}, "prompts": ("0", "10"), "seed": 3, "options": options}
        )
    )(generator)
    np.testing.assert_allclose(found.values["deviation.grey_levels"], [0, 127])
    assert found.numbers["deviation.grey_levels"] == pytest.approx(127 / 2)
    assert generator.asked == [(3, 5, 2.0), (3, 10, 2.0)]  # all else is as in the way that is measured


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="nothing to draw"):
        Deviation()(Draws())
