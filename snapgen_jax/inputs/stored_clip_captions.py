"""Stored latents, and stored token ids of captions through CLIP-L, which runs frozen inside the step.

It is `clip_captions.py` with the autoencoder's part done beforehand, by `snapgen prepare encode`. The states of a class
name are fifteen times the size of a latent at 256 px, and CLIP-L is a twentieth of an update, so that ids are stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.inputs._frozen import FrozenEncoders, StoredDtype, check_made, latent_sizes
from snapgen_jax.inputs._images import ImageCodec, Size
from snapgen_jax.inputs._latents import LATENT, OfLatents, StoredLatents
from snapgen_jax.inputs.clip_captions import ClipCaptionsConfig, ClipFrozenConfig, Null, OfClip
from snapgen_jax.inputs.interfaces import Networks, Tree
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import InputsExport


@dataclasses.dataclass(frozen=True)
class StoredClipCaptionsConfig:
    """Latents and token ids, as they were stored.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels of the images that were encoded.
        reduction: pixels along the side of one cell of the latent; 8 for the autoencoders of Stable Diffusion.
        latent_channels: of the latent.
        dtype: of latents as they are stored.
        encoders: what makes latents and token ids; the text encoder is read for training, the autoencoder for samples.
        caption_dropout: share of captions that are replaced by none, for guidance.
        null: as for `clip_captions`.
    """

    kind: Literal["stored_clip_captions"] = "stored_clip_captions"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    reduction: int = 8
    latent_channels: int = 4
    dtype: StoredDtype = "bfloat16"
    encoders: ClipFrozenConfig = ClipFrozenConfig()
    caption_dropout: float = 0.1
    null: Null = "zeros"

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1), reduction=at_least(1), latent_channels=at_least(1), caption_dropout=SHARE)

    def build(self, batch_size: int, platform: Platform) -> StoredClipCaptions:
        """Raises `ValueError` where an image size does not divide by `reduction`."""
        return StoredClipCaptions(self, batch_size, platform)

    def unstored(self) -> ClipCaptionsConfig | None:
        """Both encoders inside the step; None where one has no weights."""
        if not self.encoders.named():
            return None
        frozen = {field.name: getattr(self.encoders, field.name) for field in dataclasses.fields(ClipFrozenConfig)}
        kept = {"caption_dropout": self.caption_dropout, "null": self.null}
        return ClipCaptionsConfig(**frozen, **kept, image_sizes=self.image_sizes)


class StoredClipCaptions(OfClip, OfLatents):
    """See the top of this file. Implements `inputs.interfaces.StoredInputs`."""

    def __init__(self, config: StoredClipCaptionsConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.platform: Platform = platform
        self.latents = StoredLatents(config.image_sizes, config.reduction, config.latent_channels)
        self.text = config.encoders.text(platform)

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `latent` `[B, h, w, c]` of `dtype`, scaled as the autoencoder's config says, and
        `clip_l`, the token ids int32 `[B, 77]`."""
        return self.latents.specs(self.batch_size, self.text.specs(self.batch_size), dtype=self.config.dtype)

    def networks(self) -> dict[str, Network]:
        """ "clip_l"; the autoencoder ran beforehand."""
        return self.text_networks()

    def check_run(self, workdir: str, inputs: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Raises `ConfigError` where an earlier run had another null condition; it says nothing of its latents."""
        self.check_null(workdir, inputs, parts)

    def clean(self, networks: Networks, batch: Tree) -> jax.Array:
        """The stored latents."""
        del networks
        return batch[LATENT].astype(jnp.float32)

    def exports(self) -> InputsExport:
        """The decoder is not here.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError(
            "a bundle needs the text encoder and the decoder, and this run's config does not name both; set "
            "encoders.codec.workdir, clip_l_folder and clip_l_tokenizer under `inputs` in its config.json to local "
            "folders"
        )

    def frozen_encoders(self) -> FrozenEncoders:
        """The autoencoder, and the tokenizer, of `config.encoders`.

        Raises:
            ConfigError: they make other arrays than the config describes.
        """
        config, codec = self.config, self.config.encoders.codec
        stored = {"reduction": config.reduction, "latent_channels": config.latent_channels}
        check_made("inputs", stored, latent_sizes(codec))
        images = ImageCodec(codec, self.platform, config.image_sizes)
        return FrozenEncoders(images, config.encoders.text(self.platform), "tokens", config.dtype, lambda _: {})
