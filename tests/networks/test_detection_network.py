"""A differentiable detector: bounded, highest where exactly what is demanded is seen, and never without a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.data import shapes
from snapgen_jax.data.prompts import Demand, Requirement
from snapgen_jax.data.shapes_demands import NUMBERS_OF_A_DEMAND, numbers
from snapgen_jax.networks import detection
from snapgen_jax.networks.detection import DetectionConfig, difference
from snapgen_jax.networks.module import apply, build, init

CONFIG = DetectionConfig.preset("smoke", kinds=len(shapes.KINDS), colours=len(shapes.COLOURS))
NETWORK, SPEC = build(CONFIG)
COLOURS = tuple(shapes.COLOURS)
SIDE = 8


@pytest.fixture(scope="module")
def params():
    drawn = jax.jit(lambda key: init(NETWORK, key))(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), drawn)


def pictures(size=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((2, size, size, 3)), jnp.float32)


def demands(*demanded, relation=None):
    return numbers(Requirement(demanded, relation), CONFIG.length)[None]


def seen(*objects):
    """A density map `[1, SIDE, SIDE, K * C]` with so much mass of a kind and colour at (x, y), and little else."""
    density = np.full((1, SIDE, SIDE, CONFIG.kinds * CONFIG.colours), 1e-7, np.float32)
    for kind, colour, x, y, mass in objects:
        density[0, y, x, shapes.KINDS.index(kind) * CONFIG.colours + COLOURS.index(colour)] += mass
    return jnp.asarray(density)


@jax.jit
def reward(density, demanded):
    return apply(NETWORK, jax.tree.map(lambda x: jnp.zeros(x.shape), SPEC), density, demanded, method="reward")[0]


RED_STAR, BLUE_RING = ("star", "red", 1, 2, 1.0), ("ring", "blue", 6, 2, 1.0)
TWO = (Demand("star", 1, "red"), Demand("ring", 1, "blue"))


def test_kinds_colours_relations_and_numbers_are_those_of_the_shapes_world():
    assert len(shapes.RELATIONS) == len(detection.DIRECTIONS) and NUMBERS_OF_A_DEMAND == detection.DEMAND
    assert (DetectionConfig().kinds, DetectionConfig().colours) == (len(shapes.KINDS), len(shapes.COLOURS))
    assert CONFIG.demand_ids == 1 + max(len(shapes.KINDS), len(shapes.COLOURS), 4)


def test_a_density_is_no_less_than_zero_and_a_reward_is_bounded(params):
    density = apply(NETWORK, params, pictures(), method="density")
    assert density.shape == (2, CONFIG.cells, CONFIG.cells, 48) and density.dtype == jnp.float32 and density.min() >= 0
    evidence = apply(NETWORK, params, pictures(), method="see")
    np.testing.assert_allclose(density.sum(-1), evidence.mass, rtol=1e-5)  # each object has a kind and a colour
    found = apply(NETWORK, params, pictures(), jnp.concatenate([demands(*TWO), demands(Demand("star", 4))]))
    assert found.shape == (2,) and found.dtype == jnp.float32 and ((found > 0) & (found < 1)).all()
    everywhere = reward(100 * jnp.ones((1, SIDE, SIDE, 48)), demands(Demand("star", 1)))
    assert 0 < everywhere < 1e-3


@pytest.mark.parametrize(
    ("demanded", "objects"),
    [
        ((Demand("star", 1),), [RED_STAR]),
        ((Demand("star", 1, "red"),), [RED_STAR]),
        ((Demand("star", 2),), [RED_STAR, ("star", "cyan", 5, 5, 1.0)]),
        (TWO, [RED_STAR, BLUE_RING]),
        ((*TWO, Demand("cross", 2)), [RED_STAR, BLUE_RING, ("cross", "green", 3, 6, 2.0)]),
    ],
)
def test_exactly_what_is_demanded_is_the_best_there_is(demanded, objects):
    exact = reward(seen(*objects), demands(*demanded))
    assert exact > 0.97
    kind, colour, x, y, mass = objects[0]
    wrong = {
        "colour": [(kind, "black", x, y, mass)],
        "kind": [("circle", colour, x, y, mass)],
        "missing": [],
        "twice": [objects[0], (kind, colour, 7, 7, 1.0)],
        "beside another": [objects[0], ("triangle", "orange", 7, 7, 1.0)],
    }
    for name, first in wrong.items():
        if name == "colour" and demanded[0].colour is None:
            continue
        found = reward(seen(*first, *objects[1:]), demands(*demanded))
        assert found < 0.4, name
    half = reward(seen((kind, colour, x, y, mass - 0.25), *objects[1:]), demands(*demanded))
    assert 0.5 < half < exact


def test_colours_that_are_exchanged_are_noticed():
    exchanged = seen(("star", "blue", 1, 2, 1.0), ("ring", "red", 6, 2, 1.0))
    assert reward(exchanged, demands(*TWO)) < 0.2 < reward(seen(RED_STAR, BLUE_RING), demands(*TWO))


@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_a_relation_is_that_of_the_exact_judge(relation):
    """Centres in every direction: R is above one half just where `shapes.holds`."""
    for angle in np.arange(7, 367, 15):
        x, y = 3 + 2.9 * np.cos(np.radians(angle)), 3 + 2.9 * np.sin(np.radians(angle))
        column, row = int(x), int(y)
        shares = {
            (column + i, row + j): (1 - abs(x - column - i)) * (1 - abs(y - row - j)) for i in (0, 1) for j in (0, 1)
        }
        parts = [("ring", "blue", *cell, share) for cell, share in shares.items()]
        found = reward(seen(("star", "red", 3, 3, 1.0), *parts), demands(*TWO, relation=relation))
        holds = shapes.holds(relation, (3.0, 3.0), (x, y))
        assert (found > 0.5) == holds, angle


@pytest.mark.parametrize("objects", [[], [RED_STAR], [("cross", "green", 3, 3, 2.0), ("cross", "black", 6, 6, 2.0)]])
def test_what_is_missing_has_a_gradient(objects):
    """By the logarithm of the density, which is what a network makes first: also of an object that is nowhere."""
    density, demanded = seen(*objects), demands(*TWO, relation="left of")
    slope = jax.grad(lambda x: reward(jnp.exp(x), demanded))(jnp.log(density))
    ring = shapes.KINDS.index("ring") * CONFIG.colours + COLOURS.index("blue")
    assert float(slope[..., ring].sum()) > 2e-4
    for kind, colour, x, y, _ in objects:
        if kind == "cross":  # and what nobody asked for has one to vanish
            assert slope[0, y, x, shapes.KINDS.index(kind) * CONFIG.colours + COLOURS.index(colour)] < -1e-3


def test_nothing_demanded_is_one_half_and_teaches_nothing():
    value, slope = jax.value_and_grad(reward)(seen(RED_STAR), jnp.zeros((1, CONFIG.length), jnp.int32))
    assert value == 0.5 and not slope.any()


def test_its_gradient_by_the_image_is_that_of_its_differences(params):
    demanded = jnp.concatenate([demands(*TWO, relation="above"), demands(Demand("star", 2))])

    def total(images):
        return apply(NETWORK, params, images, demanded).sum()

    images, direction = pictures(), pictures(seed=1) - 0.5
    step = 1e-2
    difference = (total(images + step * direction) - total(images - step * direction)) / (2 * step)
    slope = jnp.sum(jax.grad(total)(images) * direction)
    assert abs(slope) > 1e-6
    np.testing.assert_allclose(slope, difference, rtol=3e-2)


def test_an_image_of_another_size_is_resized(params):
    large = pictures(16)
    small = jax.image.resize(large, (2, 8, 8, 3), "linear")
    found = [apply(NETWORK, params, images, method="density") for images in (large, small, pictures())]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert jnp.abs(found[0] - found[2]).max() > 1e-6


def test_every_parameter_matters_and_their_number_is_known(params):
    def total(params):
        return (
            jnp.square(apply(NETWORK, params, pictures(), method="see").log_kind).sum()
            + jnp.log(apply(NETWORK, params, pictures(), method="density")).sum()
        )

    assert all(jnp.abs(slope).max() > 0 for slope in jax.tree.leaves(jax.grad(total)(params)))
    assert sum(x.size for x in jax.tree.leaves(build(DetectionConfig())[1])) == 128_239


def test_half_an_object_counts_one():
    np.testing.assert_allclose([difference(0.0), difference(0.5), difference(-0.5)], [0, 1, 1], atol=1e-6)
    assert 2 < difference(1.0) < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "channels=.. halve the image 0 times"),
        ({"channels": (8, 8), "image_size": 10}, "image_size=10 does not divide by 4"),
        ({"groups": 3}, r"groups=3 do not divide channels=\[8\]"),
        ({"demands": 0}, "kinds=6, colours=8 and demands=0 count what there is"),
    ],
)
def test_widths_and_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DetectionConfig.preset("smoke", **changes)
