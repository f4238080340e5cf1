"""Stored latents, and what each text encoder made of a caption: CLIP-L, CLIP-bigG and Gemma-2-2b, not joined yet.

The step is then the network and its conditioner alone, which is how a pod pretrains. It is `encoders.py` with the
frozen part done beforehand: the conditioner is trained as there, the encoders are left out as there, and a stage of one
kind starts from a stage of the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from snapgen_jax.bounds import at_least, check
from snapgen_jax.inputs._encodings import CONDITIONER, DropRates, Encoding, Encodings, OfEncodings, clip_mask
from snapgen_jax.inputs._frozen import FrozenEncoders, StoredDtype, TextForm, check_made, latent_sizes, zero_pooled
from snapgen_jax.inputs._images import ImageCodec, Size
from snapgen_jax.inputs._latents import LATENT, OfLatents, StoredLatents
from snapgen_jax.inputs.encoders import EncodersConfig, FrozenConfig
from snapgen_jax.inputs.interfaces import Networks, Tree
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import InputsExport

CLIPS = ("clip_l", "clip_g")


@dataclasses.dataclass(frozen=True)
class StoredEncodingsConfig:
    """Latents and the states of several text encoders, as they were stored.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels of the images that were encoded.
        reduction: pixels along the side of one cell of the latent; 8 for the autoencoders of Stable Diffusion.
        latent_channels: of the latent.
        text: what is stored of a caption: "states", what each text encoder made of it; or "tokens", its ids, and the
            encoders run frozen inside the step. Ids are a thousandth of the bytes.
        dtype: of latents and states as they are stored.
        encoders: what makes them (`snapgen prepare encode`), and what is read for "tokens", for samples along the way.
        clip_l, clip_g, language: what each text encoder made of a caption; None for what `encoders` make.
        conditioner: joins them; trained beside the network.
        encoder_dropout: share of examples from which an encoder is left out, each independently: one number, or those
            of CLIP-L, CLIP-bigG and the language model.
        caption_dropout: share of examples that keep no encoder, for guidance; None for what independent rates leave.
    """

    kind: Literal["stored_encodings"] = "stored_encodings"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    reduction: int = 8
    latent_channels: int = 16
    text: TextForm = "states"
    dtype: StoredDtype = "bfloat16"
    encoders: FrozenConfig = FrozenConfig()
    clip_l: Encoding | None = None
    clip_g: Encoding | None = None
    language: Encoding | None = None
    conditioner: ConditionerConfig = ConditionerConfig.preset("t2i")
    encoder_dropout: DropRates = 0.464
    caption_dropout: float | None = None

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1), reduction=at_least(1), latent_channels=at_least(1))

    def build(self, batch_size: int, platform: Platform) -> StoredEncodings:
        """Raises `ValueError` where widths do not fit the conditioner, or an image size `reduction`."""
        return StoredEncodings(self, batch_size, platform)

    def unstored(self) -> EncodersConfig | None:
        """The same encoders inside the step; None where some have no weights."""
        if not self.encoders.named():
            return None
        frozen = {field.name: getattr(self.encoders, field.name) for field in dataclasses.fields(FrozenConfig)}
        shared = ("image_sizes", "conditioner", "encoder_dropout", "caption_dropout")
        return EncodersConfig(**frozen, **{name: getattr(self, name) for name in shared})


class StoredEncodings(OfLatents, OfEncodings):
    """See the top of this file. Implements `inputs.interfaces.StoredInputs`."""

    def __init__(self, config: StoredEncodingsConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.latents = StoredLatents(config.image_sizes, config.reduction, config.latent_channels)
        self.platform: Platform = platform
        made = config.encoders.encodings()
        shapes = {name: getattr(config, name) or made[name] for name in ENCODERS}
        self.encodings = Encodings(config.conditioner, shapes, config.encoder_dropout, config.caption_dropout, platform)
        self.text = None
        if config.text == "tokens":
            self._check_made()
            self.text = config.encoders.text(platform)

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size, of `dtype` but for the mask: `latent` `[B, h, w, c]`, scaled as the autoencoder's
        config says; of each CLIP `clip_l_states` `[B, L, D]` and `clip_l_pooled` `[B, P]`; of the language model
        `language_states` `[B, M, E]` and `language_mask` float32 `[B, M]`, 0 for padding. Or, for tokens, the ids int32
        `clip_l`, `clip_g` and `language` `[B, L]`, and `language_mask`."""
        if self.text is not None:
            return self.latents.specs(self.batch_size, self.text.specs(self.batch_size), dtype=self.config.dtype)

        def stored(*shape: int, dtype: Any = self.config.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch_size, *shape), dtype)

        arrays = {}
        for name, shape in self.encodings.shapes.items():
            arrays[f"{name}_states"] = stored(shape.tokens, shape.width)
            if name in CLIPS:
                arrays[f"{name}_pooled"] = stored(shape.pooled)
            else:
                arrays[f"{name}_mask"] = stored(shape.tokens, dtype=jnp.float32)
        return self.latents.specs(self.batch_size, arrays, dtype=self.config.dtype)

    def conditions(self) -> tuple[str, ...]:
        """All arrays but the latents."""
        (first, *_) = self.batch_specs().values()
        return tuple(name for name in first if name != LATENT)

    def networks(self) -> dict[str, Network]:
        """ "conditioner"; and for tokens the text encoders."""
        return {**self.text_networks(), CONDITIONER: self.encodings.network}

    # --- examples and conditions ---

    def clean(self, networks: Networks, batch: Tree) -> jax.Array:
        """The stored latents."""
        del networks
        return batch[LATENT].astype(jnp.float32)

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """The encodings, and which of them each example keeps."""
        del key
        if self.text is not None:
            return self.told(self.text.encode(networks, batch), kept)

        def encoding(name: str) -> TextContext:
            states = batch[f"{name}_states"]
            if name in CLIPS:
                return TextContext(states, clip_mask(states), batch[f"{name}_pooled"])
            return TextContext(states, batch[f"{name}_mask"], zero_pooled(states))

        return self.told({name: encoding(name) for name in ENCODERS}, kept)

    # --- out again ---

    def exports(self) -> InputsExport:
        """The encoders and the decoder are not here.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError(
            "a run on stored encodings holds no text encoder and no decoder, which a bundle needs; name them: snapgen "
            "export --clip_l=FOLDER --clip_g=FOLDER --language=FOLDER --decoder=WORKDIR_OR_FOLDER; an encoder that is "
            "not named is left out"
        )

    # --- how they are made ---

    def frozen_encoders(self) -> FrozenEncoders:
        """The autoencoder and the text encoders of `config.encoders`.

        Raises:
            ConfigError: they make other arrays than the config describes.
        """
        self._check_made()
        config, encoders = self.config, self.config.encoders

        def arrays(encoded: Mapping[str, TextContext]) -> dict[str, jax.Array]:
            states = {f"{name}_states": context.sequence for name, context in encoded.items()}
            pooled = {f"{name}_pooled": encoded[name].pooled for name in CLIPS}
            return {**states, **pooled, "language_mask": encoded["language"].mask}

        images = ImageCodec(encoders.codec, self.platform, config.image_sizes)
        return FrozenEncoders(images, encoders.text(self.platform), config.text, config.dtype, arrays)

    def _check_made(self) -> None:
        config, encoders = self.config, self.config.encoders
        stored = {"reduction": config.reduction, "latent_channels": config.latent_channels, **self.encodings.shapes}
        check_made("inputs", stored, {**latent_sizes(encoders.codec), **encoders.encodings()})
