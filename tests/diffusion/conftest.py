"""The one data distribution for which everything in diffusion/ has a closed form: a Gaussian."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Data x_0 ~ N(mean, covariance), flattened to D numbers an example.

    With eps ~ N(0, I) the path has x_t ~ N((1-t) mean, C_t), C_t = (1-t)^2 covariance + t^2 I; and as x_0, eps and x_t
    are jointly Gaussian,

        v(x_t, t) = E[eps - x_0 | x_t] = -mean + (t I - (1-t) covariance) C_t^-1 (x_t - (1-t) mean).

    As C_t and its derivative commute, the flow from t = 1 ends at x_0 = mean + covariance^(1/2) eps, point by point.
    """

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]

    def velocity(self, x_t, t):
        """The exact marginal velocity: x_t `[B, ...]`, t `[B]` -> `[B, ...]`."""
        values, vectors = (jnp.asarray(a, jnp.float32) for a in np.linalg.eigh(self.covariance))
        t = t[:, None]
        centred = (x_t.reshape(len(x_t), -1) - (1 - t) * self.mean) @ vectors
        c_t = (1 - t) ** 2 * values + t**2
        v = -jnp.asarray(self.mean, jnp.float32) + ((t - (1 - t) * values) / c_t * centred) @ vectors.T
        return v.reshape(x_t.shape)

    def denoise(self, x_t, t, i, carry):
        """The velocity in the form that a sampler calls."""
        del i
        return self.velocity(x_t, t), carry

    def endpoint(self, eps):
        """Where the exact flow carries noise `[B, ...]`."""
        values, vectors = np.linalg.eigh(self.covariance)
        root = (vectors * np.sqrt(values)) @ vectors.T
        return (self.mean + np.asarray(eps).reshape(len(eps), -1) @ root).reshape(eps.shape)


@pytest.fixture
def gaussian():
    """Twelve correlated numbers with variances from 0.05 to 2."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    covariance = (rotation * np.geomspace(0.05, 2.0, 12)) @ rotation.T
    return Gaussian(rng.normal(size=12).astype(np.float32), covariance)
