"""The divergence that keeps an autoencoder's latents near a standard normal distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kl_to_standard_normal(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of N(mean, exp(logvar)) from N(0, 1), a sum over all axes but the first.

        KL = sum (mean^2 + exp(logvar) - 1 - logvar) / 2

    Kingma and Welling 2014, "Auto-Encoding Variational Bayes", appendix B.

    Args:
        mean, logvar: `[B, ...]`, any float dtype.

    Returns:
        `[B]` float32.
    """
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    kl = 0.5 * (jnp.square(mean) + jnp.expm1(logvar) - logvar)
    return jnp.sum(kl, axis=tuple(range(1, kl.ndim)))
