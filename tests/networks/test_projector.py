"""The projector brings any student map to the teacher's shape: by unshuffling, by resizing, or as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.projector import ProjectorConfig
from tests.networks.tiny import drawn, outputs_without_each_leaf


@pytest.mark.parametrize(
    ("student", "teacher", "unshuffle"),
    [((8, 8, 6), (4, 4, 10), 2), ((4, 4, 6), (4, 4, 10), 1), ((4, 4, 6), (8, 8, 10), 1), ((6, 6, 3), (4, 4, 5), 1)],
)
def test_the_map_takes_the_teachers_shape(student, teacher, unshuffle):
    config = ProjectorConfig.between((1, *student), (1, *teacher))
    assert config.unshuffle == unshuffle
    network, _ = build(config)
    assert apply(network, drawn(network), jnp.ones((2, *student)), teacher[:2]).shape == (2, *teacher)


def test_unshuffling_sees_exactly_the_cells_that_become_one():
    network, _ = build(ProjectorConfig.between((8, 8, 3), (4, 4, 5)))
    params = drawn(network)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    before, after = (apply(network, params, y, (4, 4)) for y in (x, x.at[0, 2:4, 6:8].add(1.0)))
    changed = np.abs(after - before).max(axis=-1)[0] > 1e-6
    assert changed[1, 3] and changed.sum() == 1


def test_every_parameter_of_the_deeper_projector_changes_the_map():
    network, _ = build(ProjectorConfig.between((4, 4, 6), (4, 4, 10), hidden=8))
    params, x = drawn(network), jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
    whole = apply(network, params, x, (4, 4))
    for name, without in outputs_without_each_leaf(lambda p: apply(network, p, x, (4, 4)), params).items():
        assert jnp.abs(without - whole).max() > 1e-6, name
