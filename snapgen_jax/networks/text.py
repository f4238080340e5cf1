"""What a text encoder hands to a network, whatever encoded it; and what every network that denoises is given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


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


def denoiser_spec(config: Any, batch: int, sides: tuple[int, ...], tokens: int) -> tuple[Any, Any, TextContext]:
    """`ShapeDtypeStruct`s of a denoiser's positional arguments: latent, time features, text.

    Args:
        config: of the network: has `latent_channels`, `time_width`, `context_width` and `pooled_width`.
        batch: number of examples.
        sides: (height, width) of a latent, or (frames, height, width) of a clip's.
        tokens: of a text.
    """

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    context = TextContext(array(tokens, config.context_width), array(tokens), array(config.pooled_width or 0))
    return array(*sides, config.latent_channels), array(config.time_width), context


def check_widths(network: str, *widths: tuple[str, int, int]) -> None:
    """Holds what a network is given to its config: (name, width given, width expected) each.

    Raises:
        ValueError: one differs.
    """
    for name, given, expected in widths:
        if given != expected:
            raise ValueError(f"{network}: {name} {given} given, but the config says {expected}")
