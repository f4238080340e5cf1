"""Whether an image and a text belong together: binary cross-entropy."""

from __future__ import annotations

import jax


def matching_loss(true: jax.Array, false: jax.Array) -> jax.Array:
    """Cross-entropy of a text that is true of an image and of one that is false, the mean of the two.

        L = - (log p(true) + log (1 - p(false))) / 2,   p = sigmoid(logit)

    Li et al. 2022, "BLIP" (arXiv 2201.12086), section 3.2.

    Args:
        true: `[B]` logits of the true texts.
        false: `[B]` logits of the false ones.

    Returns:
        `[B]` float32.
    """
    return 0.5 * (jax.nn.softplus(-true) + jax.nn.softplus(false))
