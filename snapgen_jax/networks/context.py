"""From the outputs of several text encoders to the one `TextContext` that a network attends to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.layers import Linear, RMSNorm
from snapgen_jax.networks.module import Preset, Rules, compute_dtype
from snapgen_jax.networks.text import TextContext

ENCODERS = ("clip_l", "clip_g", "language")
_RULES: Rules = [(r"linear/kernel$", PartitionSpec("fsdp", None))]


def join_clip(clip_l: TextContext, clip_g: TextContext) -> TextContext:
    """Two CLIP encodings of one text, side by side: states `[B, L, 768 + 1280]` and pooled `[B, 768 + 1280]`.

    A token counts where either mask has it.

    Raises:
        ValueError: the texts have different lengths.
    """
    if clip_l.sequence.shape[:2] != clip_g.sequence.shape[:2]:
        raise ValueError(
            f"the CLIP encodings have [batch, tokens] {clip_l.sequence.shape[:2]} and {clip_g.sequence.shape[:2]}; "
            "encode the same texts, padded to the same length"
        )
    return TextContext(
        jnp.concatenate([clip_l.sequence, clip_g.sequence], axis=-1),
        jnp.maximum(clip_l.mask, clip_g.mask),
        jnp.concatenate([clip_l.pooled, clip_g.pooled], axis=-1),
    )


def sd3_context(clip_l: TextContext, clip_g: TextContext, t5: TextContext) -> TextContext:
    """The context of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206, section 4 and figure 2).

    The penultimate states of both CLIPs stand side by side, are padded with zeros to the width of T5 (2048 to 4096),
    and the tokens of T5 follow them (77 + 256). The pooled vector is that of both CLIPs.

    Raises:
        ValueError: the CLIP texts have different lengths, or are wider than T5's states.
    """
    clip = join_clip(clip_l, clip_g)
    missing = t5.sequence.shape[-1] - clip.sequence.shape[-1]
    if missing < 0:
        raise ValueError(
            f"CLIP states of width {clip.sequence.shape[-1]} do not fit into those of T5, which are "
            f"{t5.sequence.shape[-1]} wide; give the encoders that the network was trained with"
        )
    states = jnp.pad(clip.sequence, ((0, 0), (0, 0), (0, missing)))
    return TextContext(
        jnp.concatenate([states, t5.sequence], axis=1), jnp.concatenate([clip.mask, t5.mask], axis=1), clip.pooled
    )


def kept_shares(drop_rates: float | Sequence[float] = 0.464, none: float | None = None) -> np.ndarray:
    """Share of training examples that keep each subset of the encoders, float64 `[2, 2, 2]`: entry `[i, j, k]` of those
    that keep CLIP-L where i is 1, CLIP-bigG where j is and the language model where k is.

        p(k) = prod_i d_i^(1 - k_i) (1 - d_i)^(k_i),   for k != 0 times (1 - none) / (1 - prod_i d_i)

    Args:
        drop_rates: d, how often each encoder is left out, independently of the others; one number for all. Three at
            0.464 leave one example in ten without any (Esser et al. 2024, section 5.3.3).
        none: share of examples that keep no encoder, for classifier-free guidance; None for what independent rates
            leave, their product. The others are independent but for keeping at least one.

    Raises:
        ValueError: a rate or the share is none, there are not as many as encoders, or no example could keep any.
    """
    rates = np.asarray([drop_rates] * len(ENCODERS) if isinstance(drop_rates, int | float) else drop_rates, np.float64)
    if rates.shape != (len(ENCODERS),) or not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError(
            f"encoder_dropout={drop_rates}; give one rate from 0 to 1, or one for each of {', '.join(ENCODERS)}"
        )
    shares = np.ones(())
    for rate in rates:
        shares = np.multiply.outer(shares, [rate, 1 - rate])
    if none is None:
        return shares
    if not 0 <= none <= 1:
        raise ValueError(f"caption_dropout={none}; give a share from 0 to 1, or None for the product of the rates")
    nothing = (0,) * len(ENCODERS)
    left = 1 - shares[nothing]
    if not left and none < 1:
        raise ValueError(
            f"encoder_dropout={drop_rates} leaves out every encoder, and caption_dropout={none} wants some kept; lower "
            "encoder_dropout"
        )
    shares = shares * ((1 - none) / left if left else 0.0)
    shares[nothing] = none
    return shares


def draw_kept(key: jax.Array, batch: int, shares: np.ndarray) -> dict[str, jax.Array]:
    """Which encoders a training example keeps: `{encoder: [B]}` of 1 and 0, drawn by `kept_shares`."""
    with np.errstate(divide="ignore"):
        logits = np.log(shares.ravel())
    drawn = jax.random.categorical(key, jnp.asarray(logits, jnp.float32), shape=(batch,))
    kept = jnp.unravel_index(drawn, shares.shape)
    return {name: rows.astype(jnp.float32) for name, rows in zip(ENCODERS, kept, strict=True)}


@dataclasses.dataclass(frozen=True)
class ConditionerConfig(Preset):
    """What a `Conditioner` joins.

    Attributes:
        width: of the context, and of the states of both CLIPs side by side.
        language_width: width of the language model's states.
        epsilon: of the norm.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["conditioner"] = "conditioner"
    width: int = 2048
    language_width: int = 2304
    epsilon: float = 1e-6
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the conditioner with freshly drawn parameters."""
        return Conditioner(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, tokens: int = 77) -> tuple[TextContext, ...]:
        """`ShapeDtypeStruct`s of a `Conditioner`'s positional arguments, CLIP widths in the ratio of SnapGen's."""
        clip_l = self.width * 3 // 8

        def context(width: int) -> TextContext:
            shapes = ((batch, tokens, width), (batch, tokens), (batch, width))
            arrays: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            return TextContext(*arrays)

        return context(clip_l), context(self.width - clip_l), context(self.language_width)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {"width": 16, "language_width": 12}, "t2i": {}}


class Conditioner(nnx.Module):
    """The context of SnapGen: CLIP-L and CLIP-bigG side by side, and the tokens of Gemma-2-2b after them.

    The language model's states are normalised, because their scale is far from one, and mapped to the width of the
    context. An encoder that is dropped leaves zeros, and its tokens are masked, so that dropping the language model in
    training is what leaving it out on a phone is. Build it through `networks.module.build`.
    """

    def __init__(self, config: ConditionerConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.config = config
        self.norm = RMSNorm(config.language_width, epsilon=config.epsilon, dtype=dtype)
        self.linear = Linear(config.language_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        clip_l: TextContext,
        clip_g: TextContext,
        language: TextContext | None = None,
        kept: dict[str, jax.Array] | None = None,
    ) -> TextContext:
        """Joins the encodings of one text.

        Args:
            clip_l, clip_g: `[B, L, D]` penultimate states and pooled projections.
            language: `[B, M, language_width]` states; None leaves its tokens out.
            kept: `{encoder: [B]}` from `draw_kept`; None keeps all.

        Returns:
            sequence `[B, L + M, width]`, mask `[B, L + M]`, pooled `[B, P]` of both CLIPs; float32.

        Raises:
            ValueError: the CLIP texts have different lengths, or other widths than the config says.
        """
        if kept is not None:
            clip_l, clip_g = _keep(clip_l, kept["clip_l"]), _keep(clip_g, kept["clip_g"])
        clip = join_clip(clip_l, clip_g)
        if clip.sequence.shape[-1] != self.config.width:
            raise ValueError(
                f"Conditioner: the CLIP states are {clip.sequence.shape[-1]} wide together, but width is "
                f"{self.config.width}; make them equal"
            )
        if language is None:
            return clip
        states = self.linear(self.norm(language.sequence)).astype(jnp.float32)
        language = TextContext(states, language.mask, language.pooled)
        if kept is not None:
            language = _keep(language, kept["language"])
        return TextContext(
            jnp.concatenate([clip.sequence, language.sequence], axis=1),
            jnp.concatenate([clip.mask, language.mask], axis=1),
            clip.pooled,
        )


def _keep(context: TextContext, kept: jax.Array) -> TextContext:
    """The encodings of the examples where `kept` `[B]` is 1, and zeros for the others."""
    column = kept[:, None]
    return TextContext(context.sequence * column[:, :, None], context.mask * column, context.pooled * column)
