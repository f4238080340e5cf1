"""Stored latents and text states: what frozen encoders made of images and captions, joined beforehand.

The states are what one network reads as they are, such as a published teacher: by default Stable Diffusion 3.5, whose
encoders `snapgen prepare encode` runs. Where a conditioner is trained on the
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
from snapgen_jax.diffusion.guidance import draw_kept
from snapgen_jax.inputs._frozen import FrozenEncoders, StoredDtype, TextForm, check_made, latent_sizes
from snapgen_jax.inputs._images import ImageCodec, Size
from snapgen_jax.inputs._latents import LATENT, OfLatents, StoredLatents
from snapgen_jax.inputs.interfaces import Networks, Tree
from snapgen_jax.inputs.sd3_encoders import (
    SD3_TEXTS,
    SD3EncodersConfig,
    SD3FrozenConfig,
    keep_text,
    null_text,
    sd3_states,
)
from snapgen_jax.networks.context import sd3_context
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import InputsExport

CONTEXT = ("sequence", "mask", "pooled")


@dataclasses.dataclass(frozen=True)
class StoredConfig:
    """Latents and text states, as they were stored.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels of the images that were encoded.
        reduction: pixels along the side of one cell of the latent; 8 for the autoencoders of Stable Diffusion.
        latent_channels: of the latent; 0 where only text states are stored, for a teacher on the student's latents.
        text: what is stored of a caption: "states", what the text encoders made of it; or "tokens", its ids, and the
            encoders run frozen inside the step.
        dtype: of latents and states as they are stored.
        encoders: what makes them (`snapgen prepare encode`), and what is read for "tokens", for samples along the way.
        context_tokens: text states in a caption. 77 of CLIP and 128 of Gemma make 205; 77 and 256 of T5 make 333.
        context_width, pooled_width: widths of the text states and of the pooled text.
        caption_dropout: share of captions whose states are replaced by none: zeros that are masked.
        prefix: begins the name of every array of a batch: "teacher_" for the states that a teacher reads.
    """

    kind: Literal["stored"] = "stored"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    reduction: int = 8
    latent_channels: int = 16
    text: TextForm = "states"
    dtype: StoredDtype = "bfloat16"
    encoders: SD3FrozenConfig = SD3FrozenConfig()
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
        return Stored(self, batch_size, platform)

    def unstored(self) -> SD3EncodersConfig | None:
        """The same encoders inside the step; None where some have no weights."""
        if not self.encoders.named():
            return None
        frozen = {field.name: getattr(self.encoders, field.name) for field in dataclasses.fields(SD3FrozenConfig)}
        shared = ("image_sizes", "caption_dropout", "prefix")
        return SD3EncodersConfig(**frozen, **{name: getattr(self, name) for name in shared})


class Stored(OfLatents):
    """See the top of this file. Implements `inputs.interfaces.StoredInputs`."""

    def __init__(self, config: StoredConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.platform: Platform = platform
        self.latents = StoredLatents(config.image_sizes, config.reduction, config.latent_channels)
        self.text = None
        if config.text == "tokens":
            self._check_made()
            self.text = config.encoders.text(platform, config.prefix)

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size, of `dtype` but for the mask: `latent` `[B, h, w, c]`, scaled as the autoencoder's
        config says; `sequence` `[B, L, D]`, `mask` float32 `[B, L]` and `pooled` `[B, P]`; each after the prefix. Or,
        for tokens, the ids int32 `clip_l`, `clip_g` and `t5` `[B, L]` in place of these."""
        config = self.config
        if self.text is not None:
            latents = self.latents.specs(self.batch_size, {}, config.prefix, config.dtype)
            return {bucket: {**specs, **self.text.specs(self.batch_size)} for bucket, specs in latents.items()}

        def stored(*shape: int, dtype: Any = config.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch_size, *shape), dtype)

        context = {
            "sequence": stored(config.context_tokens, config.context_width),
            "mask": stored(config.context_tokens, dtype=jnp.float32),
            "pooled": stored(config.pooled_width),
        }
        return self.latents.specs(self.batch_size, context, config.prefix, config.dtype)

    def conditions(self) -> tuple[str, ...]:
        """The text states, their mask, and the pooled text; or the token ids."""
        if self.text is not None:
            return tuple(self.text.specs(1))
        return tuple(f"{self.config.prefix}{name}" for name in CONTEXT)

    def networks(self) -> dict[str, Network]:
        """The text encoders, where they run inside the step."""
        return self.text_networks()

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
        """The text states, zeros where the text is not kept."""
        del key
        if self.text is not None:
            return keep_text(sd3_states(self.text, networks, batch), kept)
        return keep_text({name: batch[f"{self.config.prefix}{name}"] for name in CONTEXT}, kept)

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """The text states in float32."""
        del networks
        return TextContext(*(drawn[name].astype(jnp.float32) for name in CONTEXT))

    def null_condition(self, networks: Networks) -> TextContext:
        """Zeros that are masked, `[1, ...]`."""
        del networks
        config = self.config
        return null_text(config.context_tokens, config.context_width, config.pooled_width)

    # --- how they are made ---

    def frozen_encoders(self) -> FrozenEncoders:
        """The text encoders of `config.encoders`, and its autoencoder where latents are stored here.

        Raises:
            ConfigError: they make other arrays than the config describes.
        """
        self._check_made()
        config = self.config
        text = config.encoders.text(self.platform, config.prefix)

        def arrays(encoded: Mapping[str, TextContext]) -> dict[str, jax.Array]:
            context = sd3_context(*(encoded[name] for name in SD3_TEXTS))
            return {"sequence": context.sequence, "mask": context.mask, "pooled": context.pooled}

        images = (
            ImageCodec(config.encoders.codec, self.platform, config.image_sizes) if config.latent_channels else None
        )
        return FrozenEncoders(images, text, config.text, config.dtype, arrays)

    def _check_made(self) -> None:
        config, made = self.config, self.config.encoders.context()
        stored = {name: getattr(config, name) for name in made}
        if config.latent_channels:
            made |= latent_sizes(config.encoders.codec)
            stored |= {"reduction": config.reduction, "latent_channels": config.latent_channels}
        check_made("teacher.inputs" if config.prefix else "inputs", stored, made)

    # --- out again ---

    def exports(self) -> InputsExport:
        """The text states are the bundle's inputs, since a run does not say which encoders made them; its output is the
        latent, until a decoder is put behind it.

        Raises:
            ConfigError: token ids are stored, and T5-XXL runs inside the step.
        """
        if self.text is not None:
            raise ConfigError(
                "this run reads token ids by the encoders of Stable Diffusion 3.5, and T5-XXL is too large for one; "
                "export a run that was trained on inputs.kind='stored_encodings'"
            )
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
