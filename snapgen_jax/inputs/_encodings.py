"""What the kinds of example share whose captions are read by CLIP-L, CLIP-bigG and a language model, inside the step or
beforehand: a trained conditioner joins the three, and each is left out of an example now and then.

The conditioner is trained beside the network, and every stage carries it on. Each encoder is left out independently, so
that a network that was trained with all of them draws on a phone from CLIP alone (SnapGen, arXiv 2412.09619, section
3.1; Esser et al. 2024, section 5.3.3); the examples that keep none are for classifier-free guidance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from snapgen_jax.inputs.interfaces import Networks, Tree, is_kept
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig, draw_kept, kept_shares
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform
from snapgen_jax.networks.text import TextContext

CONDITIONER = "conditioner"
DropRates = float | tuple[float, float, float]
"""Of CLIP-L, CLIP-bigG and the language model; one number for all."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The shape of what one text encoder makes of a caption.

    Attributes:
        tokens: states in a caption.
        width: of a state.
        pooled: width of the pooled vector; the language model's is not read.
    """

    tokens: int
    width: int
    pooled: int = 0


class Encodings:
    """The encodings of a caption on their way to a context: which are kept, and the conditioner that joins them."""

    def __init__(
        self,
        conditioner: ConditionerConfig,
        shapes: Mapping[str, Encoding],
        encoder_dropout: DropRates,
        caption_dropout: float | None,
        platform: Platform,
    ):
        """`shapes`: by encoder.

        Raises:
            ValueError: the conditioner joins states of other widths, the two CLIPs have different lengths, or a rate of
                dropout is none.
        """
        clip_l, clip_g, language = (shapes[name] for name in ENCODERS)
        for what, expected, given, name in (
            ("the CLIP states together", clip_l.width + clip_g.width, conditioner.width, "conditioner.width"),
            ("the language model's states", language.width, conditioner.language_width, "conditioner.language_width"),
        ):
            if expected != given:
                raise ValueError(f"{what} are {expected} wide, but inputs.{name} is {given}; make them equal")
        if clip_l.tokens != clip_g.tokens:
            raise ValueError(
                f"inputs.clip_l has {clip_l.tokens} tokens and inputs.clip_g {clip_g.tokens}; make them equal, since "
                "their states stand side by side"
            )
        self.shapes, self.shares = dict(shapes), kept_shares(encoder_dropout, caption_dropout)
        self.network: Network = build(for_platform(conditioner, platform))[0]

    def context_shapes(self) -> tuple[tuple[int, int], tuple[int], tuple[int]]:
        """Of states, mask and pooled text of one example."""
        clip_l, clip_g, language = (self.shapes[name] for name in ENCODERS)
        length, width = clip_l.tokens + language.tokens, self.network.config.width
        return (length, width), (length,), (clip_l.pooled + clip_g.pooled,)

    def nothing(self, encoder: str, rows: int) -> TextContext:
        """What stands in the place of an encoder that is not there, `[B, ...]` with `rows` examples: masked zeros."""
        shape = self.shapes[encoder]
        return TextContext(
            jnp.zeros((rows, shape.tokens, shape.width)),
            jnp.zeros((rows, shape.tokens)),
            jnp.zeros((rows, shape.pooled)),
        )


class OfEncodings:
    """The part of an `Inputs` that these kinds share. `draw_condition` is their own, and ends in `told`.

    Attributes:
        encodings: what joins them.
    """

    encodings: Encodings

    def unconditional_share(self) -> float:
        """Share of examples that keep no encoder."""
        return float(self.encodings.shares[0, 0, 0])

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{encoder: float32 [B]}`, 0 where it is left out; see `networks.context.kept_shares`."""
        return draw_kept(key, batch_size, self.encodings.shares)

    def told(self, encoded: Mapping[str, TextContext], kept: Mapping[str, jax.Array]) -> Tree:
        """The encodings `{encoder: TextContext}`, and beside them which of them each example keeps, if not all."""
        rows = {name: is_kept(kept, name) for name in ENCODERS}
        named = {name: x.astype(jnp.float32) for name, x in rows.items() if x is not None}
        return {**encoded, "kept": named} if named else dict(encoded)

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """What the network attends to: the encodings, joined by the conditioner, float32."""
        encoded = (drawn[name] for name in ENCODERS)
        context = apply(self.encodings.network, networks[CONDITIONER], *encoded, kept=drawn.get("kept"))
        return jax.tree.map(lambda x: x.astype(jnp.float32), context)

    def null_condition(self, networks: Networks) -> TextContext:
        """Of a caption from which all encoders are left out: zeros that are masked, `[1, ...]`."""
        del networks
        return TextContext(*(jnp.zeros((1, *shape)) for shape in self.encodings.context_shapes()))


def clip_mask(tokens: jax.Array) -> jax.Array:
    """Of CLIP's states or token ids `[B, L, ...]`: float32 ones `[B, L]`. Every position counts: it was trained to see
    all 77."""
    return jnp.ones(tokens.shape[:2], jnp.float32)
