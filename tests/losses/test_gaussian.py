"""The Kullback-Leibler divergence against an integral, and where it is zero."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate, stats

from snapgen_jax.losses.gaussian import kl_to_standard_normal


def test_it_equals_the_integral_of_its_definition():
    mean, logvar = np.array([[0.3, -1.2], [2.0, 0.0]]), np.array([[0.5, -0.7], [0.0, 1.0]])

    def integral(m, v):
        p, q = stats.norm(m, np.exp(0.5 * v)), stats.norm()
        return integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -20, 20)[0]

    expected = [np.sum([integral(m, v) for m, v in zip(*row, strict=True)]) for row in zip(mean, logvar, strict=True)]
    np.testing.assert_allclose(kl_to_standard_normal(jnp.asarray(mean), jnp.asarray(logvar)), expected, rtol=1e-5)


def test_it_is_zero_with_no_gradient_at_the_standard_normal_alone():
    zeros = jnp.zeros((2, 3, 4))
    gradient = jax.grad(lambda m, v: kl_to_standard_normal(m, v).sum(), argnums=(0, 1))
    assert not np.any(kl_to_standard_normal(zeros, zeros)) and not np.any(gradient(zeros, zeros))
    for moved in (-0.1, 0.1):
        assert np.all(kl_to_standard_normal(zeros, zeros + moved) > 0)
        assert np.all(kl_to_standard_normal(zeros + moved, zeros) > 0)
