"""What a text encoder hands to a network, whatever encoded it."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextContext:
    """Text as a network sees it.

    Attributes:
        sequence: `[B, L, D]` states, one a token.
        mask: `[B, L]` float32, 1 for tokens to attend to and 0 for padding.
        pooled: `[B, P]` one vector a text.
    """

    sequence: jax.Array
    mask: jax.Array
    pooled: jax.Array
