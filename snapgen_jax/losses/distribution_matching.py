"""Distribution matching: what is generated moves from where its own distribution is dense to where the teacher's is."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def distribution_matching_loss(x_0: jax.Array, critic: jax.Array, teacher: jax.Array) -> jax.Array:
    """A loss whose gradient by what is generated is the difference of two scores, over the teacher's distance.

        d L_b / d x_0 = (critic - teacher) / (n max(mean|x_0 - teacher|, 1e-3)),   n the elements of an example

    Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation", equations 7 and 8: both scores are
    given as the data that their network sees behind the same noisy x_0.

    Args:
        x_0: `[B, ...]` what is generated.
        critic, teacher: `[B, ...]` those data ends; no gradient passes.

    Returns:
        `[B]` float32: half the mean squared step that an example is to take.
    """
    axes = tuple(range(1, x_0.ndim))
    x_0, critic, teacher = (x.astype(jnp.float32) for x in (x_0, critic, teacher))
    scale = jnp.maximum(jnp.mean(jnp.abs(x_0 - teacher), axis=axes, keepdims=True), 1e-3)
    towards = jax.lax.stop_gradient(x_0 - (critic - teacher) / scale)
    return 0.5 * jnp.mean(jnp.square(x_0 - towards), axis=axes)
