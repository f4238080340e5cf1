"""Adversarial losses: the hinge (Lim and Ye 2017, "Geometric GAN"), the gradient penalty R1, and a balancing weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def hinge_discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
    """What a discriminator minimises, `max(0, 1 - D(x)) + max(0, 1 + D(x~))`, a mean over all axes but the first.

    Lim and Ye 2017, section 3. It is 2 where the discriminator says 0 of everything, and 0 where it is right by a
    margin of one.

    Args:
        real_logits, fake_logits: `[B, ...]` of examples from the data and from the generator.

    Returns:
        `[B]` float32.
    """
    return _mean(jax.nn.relu(1 - _float32(real_logits))) + _mean(jax.nn.relu(1 + _float32(fake_logits)))


def hinge_generator_loss(fake_logits: jax.Array) -> jax.Array:
    """What a generator minimises against the hinge, `-D(x~)`, a mean over all axes but the first: `[B]` float32."""
    return -_mean(_float32(fake_logits))


def gradient_penalty(discriminate: Callable[[Tree], Tree], real: Tree) -> jax.Array:
    """R1, the squared gradient of a head's logits by what it sees of the data: `|| d sum D(x) / d x ||^2`.

    Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?", eq. 9, without its factor of 1/2.
    Where the discriminator is heads on a frozen trunk, `real` are the features of the trunk (Sauer et al. 2023,
    "Adversarial Diffusion Distillation", section 3.2), so that the penalty does not pass through it. An example's
    logits are summed: the mean of n cells would have a penalty n^2 times as small, which is none on a large grid.

    Args:
        discriminate: a tree of `[B, ...]`, a leaf for each head, to a tree of the heads' logits `[B, ...]`. Nothing may
            mix the examples, and a head sees its own leaf alone.
        real: the tree at the data.

    Returns:
        `[B]` float32: the gradient of an example's logits, squared and summed over cells and channels; a mean of heads.
    """
    gradients = jax.grad(lambda seen: sum(jnp.sum(_float32(x)) for x in jax.tree.leaves(discriminate(seen))))(real)
    squares = [jnp.sum(jnp.square(_float32(g)), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients)]
    return sum(squares[1:], squares[0]) / len(squares)


def adaptive_weight(task_norm: jax.Array, adversarial_norm: jax.Array, limit: float = 1e4) -> jax.Array:
    """How much of the adversarial loss balances the task's, from the norms of their gradients at the last layer.

        w = |grad L_task| / (|grad L_G| + 1e-4),   at most `limit`

    Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", eq. 7; the floor and the limit are
    those of its code. The weight is a constant to the gradient.

    Args:
        task_norm, adversarial_norm: scalars, L2 norms over the same parameters.

    Returns:
        float32 scalar.
    """
    weight = _float32(task_norm) / (_float32(adversarial_norm) + 1e-4)
    return jax.lax.stop_gradient(jnp.minimum(weight, limit))


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
