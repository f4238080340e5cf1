"""Preference without a reward network: Diffusion-DPO."""

from __future__ import annotations

import jax


def preference_loss(margin: jax.Array) -> jax.Array:
    """How unlikely a preference is to a network that is compared with its reference.

        L = - log sigmoid(margin)

    Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908), eq. 14.

    Args:
        margin: `[B]`, see `preference_margin`.

    Returns:
        `[B]`; log 2 where the network is its reference.
    """
    return jax.nn.softplus(-margin)


def preference_margin(
    better: jax.Array,
    better_reference: jax.Array,
    worse: jax.Array,
    worse_reference: jax.Array,
    scale: jax.Array | float,
) -> jax.Array:
    """By how much more a network prefers the better of two examples than its reference does: its implicit reward.

        margin = - beta T w(t) [ (e_w - e_w,ref) - (e_l - e_l,ref) ],   e = | v - v_theta |^2

    Args:
        better, worse: `[B]` squared errors of the network at a noised example, the preferred one and the other.
        better_reference, worse_reference: `[B]` those of the reference, at the same noise and time.
        scale: `beta T w(t)`, one number or `[B]`.

    Returns:
        `[B]`.
    """
    return -scale * ((better - better_reference) - (worse - worse_reference))
