"""Distribution matching: its gradient is the difference of two scores over the teacher's distance."""

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.losses.distribution_matching import distribution_matching_loss


def test_its_gradient_is_critic_less_teacher_over_the_teachers_mean_distance():
    x_0, critic, teacher = jnp.array([[1.0, 3.0], [0.0, 0.0]]), jnp.array([[2.0, 2.0], [1.0, 0.0]]), jnp.zeros((2, 2))
    slope = jax.grad(lambda x: distribution_matching_loss(x, critic, teacher).sum())(x_0)
    # of the first example the teacher is 2 away on the mean of 2 numbers; of the second 0, which the bound replaces
    np.testing.assert_allclose(slope, [[2 / (2 * 2), 2 / (2 * 2)], [1 / (2 * 1e-3), 0.0]], rtol=1e-5)
    np.testing.assert_allclose(distribution_matching_loss(x_0, critic, teacher)[0], 0.5, rtol=1e-6)  # a step of (1, 1)


def test_no_gradient_passes_to_the_two_scores():
    x = jax.random.normal(jax.random.key(0), (3, 2, 4))
    slopes = jax.grad(lambda a, b: distribution_matching_loss(x[0], a, b).sum(), argnums=(0, 1))(x[1], x[2])
    assert not np.any(slopes)
