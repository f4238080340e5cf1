"""The loss of a density map: least where it is what the objects of the image say, and of a point process."""

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.losses.detection import detection_loss, splatted

OBJECTS = jnp.array([[[1, 2], [3, 1], [0, 0]]], jnp.int32)
PLACES = jnp.array([[[-0.5, 0.25], [0.75, -0.75], [0.0, 0.0]]], jnp.float32)
AMOUNTS = jnp.array([[1.0, 0.5, 1.0]])


def test_an_object_is_one_unit_of_mass_around_its_centre():
    found = np.asarray(splatted(jnp.array([[[-0.5, 0.25], [0.98, 0.0], [1.2, 0.0]]]), 8, 16))
    np.testing.assert_allclose(found.sum((2, 3)), [[1, 1, 0]], rtol=1e-6)  # also at the edge; not outside
    across, down = (np.arange(16) + 0.5) / 8 - 1, (np.arange(8) + 0.5) / 4 - 1
    centre = (found[0, 0].sum(0) @ across, found[0, 0].sum(1) @ down)
    np.testing.assert_allclose(centre, (-0.5, 0.25), atol=2e-3)


def loss(mass, kind, colour):
    return detection_loss(mass, jax.nn.log_softmax(kind), jax.nn.log_softmax(colour), OBJECTS, PLACES, AMOUNTS)[0]


def test_it_is_least_at_the_amounts_kinds_and_colours_of_the_objects():
    y = jnp.einsum("bn,bnhw->bhw", AMOUNTS.at[0, 2].set(0), splatted(PLACES, 8, 8))
    sure = [
        100 * jax.nn.one_hot(jnp.where(jnp.arange(8)[None, None] < 5, a, b), n) for a, b, n in ((0, 2, 3), (1, 0, 2))
    ]
    kind, colour = (jnp.broadcast_to(x, (1, 8, 8, x.shape[-1])) for x in sure)
    best = float(loss(y + 1e-12, kind, colour))
    assert 0 <= best < 1e-2
    for scale in (0.8, 1.25):
        assert loss(scale * y + 1e-12, kind, colour) > best + 0.01
    assert loss(y + 1e-3, kind, colour) > best + 0.02  # mass where nothing is
    for wrong in ((-kind, colour), (kind, -colour)):
        assert loss(y + 1e-12, *wrong) > best + 10


def test_it_is_the_deviance_of_a_poisson_process_and_the_cross_entropy_of_its_points():
    rng = np.random.default_rng(0)
    mass = rng.uniform(0.01, 1, (1, 4, 4))
    logits = [rng.normal(size=(1, 4, 4, n)) for n in (3, 2)]
    kind, colour = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    each = np.asarray(splatted(PLACES, 4, 4), np.float64)
    y, expected = each[0, 0] + 0.5 * each[0, 1], 0.0
    expected = (mass[0] - y + y * np.log(y / mass[0])).sum()
    for amount, n, k, c in ((1.0, 0, 0, 1), (0.5, 1, 2, 0)):
        expected -= amount * (each[0, n] * (kind[0, ..., k] + colour[0, ..., c])).sum()
    args = (jnp.asarray(x, jnp.float32) for x in (mass, kind, colour))
    np.testing.assert_allclose(detection_loss(*args, OBJECTS, PLACES, AMOUNTS)[0], expected, rtol=1e-5)
