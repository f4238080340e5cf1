"""Stored latents and text states: what frozen encoders made of images and captions, joined beforehand.

The states are what one network reads as they are, such as a published teacher. Where a conditioner is trained on the
states of several encoders, see `stored_encodings.py`. A dropped caption leaves zeros that are masked, as Stable
Diffusion 3 was trained (Esser et al. 2024, section B.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.diffusion.guidance import draw_kept, keep
from snapgen_jax.inputs._images import Size
from snapgen_jax.inputs._latents import LATENT, OfLatents, StoredLatents
from snapgen_jax.inputs.interfaces import Networks, Tree, is_kept
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exports import InputsExport

CONTEXT = ("sequence", "mask", "pooled")


@dataclasses.dataclass(frozen=True)
class StoredConfig:
    """Latents and text states, as they were stored.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels of the images that were encoded.
        reduction: pixels along the side of one cell of the latent; 8 for the autoencoders of Stable Diffusion.
        latent_channels: of the latent; 0 where only text states are stored, for a teacher on the student's latents.
        context_tokens: text states in a caption. 77 of CLIP and 128 of Gemma make 205; 77 and 256 of T5 make 333.
        context_width, pooled_width: widths of the text states and of the pooled text.
        caption_dropout: share of captions whose states are replaced by none: zeros that are masked.
        prefix: begins the name of every array of a batch: "teacher_" for the states that a teacher reads.
    """

    kind: Literal["stored"] = "stored"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    reduction: int = 8
    latent_channels: int = 16
    context_tokens: int = 205
    context_width: int = 2048
    pooled_width: int = 2048
    caption_dropout: float = 0.1
    prefix: str = ""

    def __post_init__(self) -> None:
        positive = at_least(1)
        check(self, image_sizes=positive, reduction=positive, latent_channels=at_least(0), context_tokens=positive)
        check(self, context_width=positive, pooled_width=positive, caption_dropout=SHARE)

    def build(self, batch_size: int, platform: Platform) -> Stored:
        """Raises `ValueError` where an image size does not divide by `reduction`."""
        del platform
        return Stored(self, batch_size)


class Stored(OfLatents):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: StoredConfig, batch_size: int):
        self.config, self.batch_size = config, batch_size
        self.latents = StoredLatents(config.image_sizes, config.reduction, config.latent_channels)

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size, all bfloat16 but the mask: `latent` `[B, h, w, c]`, scaled as the autoencoder's
        config says; `sequence` `[B, L, D]`, `mask` float32 `[B, L]` and `pooled` `[B, P]`; each after the prefix."""
        config = self.config

        def stored(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch_size, *shape), dtype)

        context = {
            "sequence": stored(config.context_tokens, config.context_width),
            "mask": stored(config.context_tokens, dtype=jnp.float32),
            "pooled": stored(config.pooled_width),
        }
        return self.latents.specs(self.batch_size, context, config.prefix)

    def conditions(self) -> tuple[str, ...]:
        """The text states, their mask, and the pooled text."""
        return tuple(f"{self.config.prefix}{name}" for name in CONTEXT)

    def networks(self) -> dict[str, Network]:
        """None: they ran beforehand."""
        return {}

    # --- examples and conditions ---

    def clean(self, networks: Networks, batch: Tree) -> jax.Array:
        """The stored latents."""
        del networks
        return batch[f"{self.config.prefix}{LATENT}"].astype(jnp.float32)

    def unconditional_share(self) -> float:
        """`caption_dropout`."""
        return self.config.caption_dropout

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{"text": bool [B]}`, false with probability `caption_dropout`."""
        return {"text": draw_kept(key, batch_size, self.config.caption_dropout)}

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """The stored text states, zeros where the text is not kept."""
        del networks, key
        states = {name: batch[f"{self.config.prefix}{name}"] for name in CONTEXT}
        rows = is_kept(kept, "text")
        if rows is None:
            return states
        return keep(rows, states, jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), states))

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """The text states in float32."""
        del networks
        return TextContext(*(drawn[name].astype(jnp.float32) for name in CONTEXT))

    def null_condition(self, networks: Networks) -> TextContext:
        """Zeros that are masked, `[1, ...]`."""
        del networks
        config = self.config
        shapes = (config.context_tokens, config.context_width), (config.context_tokens,), (config.pooled_width,)
        return TextContext(*(jnp.zeros((1, *shape)) for shape in shapes))

    # --- out again ---

    def exports(self) -> InputsExport:
        """The text states are the bundle's inputs, since a run does not say which encoders made them; its output is the
        latent, until a decoder is put behind it."""
        config, random = self.config, np.random.default_rng(0)
        null = {
            "sequence": np.zeros((config.context_tokens, config.context_width), np.float32),
            "mask": np.zeros(config.context_tokens, np.float32),
            "pooled": np.zeros(config.pooled_width, np.float32),
        }
        golden = {name: random.standard_normal((2, *x.shape), np.float32) for name, x in null.items()}
        position = np.arange(config.context_tokens)
        golden["mask"] = np.stack([np.ones(position.shape), position % 2]).astype(np.float32)
        return InputsExport([], null, None, golden=golden)
