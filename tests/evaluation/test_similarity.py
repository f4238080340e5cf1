"""How alike modules' outputs are from step to step, as a picture."""

import numpy as np
import pytest

from snapgen_jax.evaluation.similarity import CELL, GAP, HIGH, LOW, Similarity, heat_map


def test_a_heat_map_is_dark_at_the_least_and_light_at_the_greatest():
    picture = heat_map({"block_00_attention": [0.2, 1.0], "f": [0.6, 0.2]})
    cells = picture[GAP + CELL // 2 :: CELL, -GAP - CELL - CELL // 2 :: CELL][:2, :2]
    np.testing.assert_array_equal(cells[0], [LOW, HIGH])
    np.testing.assert_allclose(cells[1], [(LOW + HIGH) / 2, LOW], atol=1)


def test_it_needs_the_validation_split():
    with pytest.raises(ValueError, match="validation split"):
        Similarity(lambda *args: {})(None)
