"""The frozen encoders behind stored inputs: what makes their arrays of pictures and captions, before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.inputs._images import ImageCodec
from snapgen_jax.inputs._latents import LATENT
from snapgen_jax.inputs._text_encoders import TextEncoders, architecture
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import Network
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exits import ConfigError

TextForm = Literal["states", "tokens"]
StoredDtype = Literal["bfloat16", "float32"]


class FrozenEncoders:
    """Implements `inputs.interfaces.FrozenEncoders`."""

    def __init__(
        self,
        images: ImageCodec | None,
        text: TextEncoders,
        form: TextForm,
        dtype: StoredDtype,
        arrays: Callable[[Mapping[str, TextContext]], Mapping[str, jax.Array]],
    ):
        """
        Args:
            images: makes the latents; None where none are stored.
            text: the text encoders.
            form: what is stored of a caption: what they make of it, or its token ids.
            dtype: of latents and states.
            arrays: the states to store, of what the encoders make; masks among them.
        """
        self.images, self.text, self.form, self.dtype, self._arrays = images, text, form, dtype, arrays

    def networks(self) -> dict[str, Network]:
        """The codec, and for states the text encoders."""
        codec = {} if self.images is None else self.images.networks()
        return {**(self.text.networks() if self.form == "states" else {}), **codec}

    def load(self, mesh: Mesh | None) -> dict[str, Tree]:
        """Reads all of `networks()` onto the mesh, or draws them where the config says so."""
        return self.text.load(tuple(self.networks()), self.images, mesh)

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """Those of the text encoders."""
        return self.text.tokenizers()

    def encode_images(self, networks: Networks, images: jax.Array) -> dict[str, jax.Array]:
        """uint8 `[B, H, W, 3]` to `{"latent": [B, h, w, c]}`."""
        if self.images is None:
            return {}
        latent = self.images.encode(networks, images).astype(self.dtype)
        return {f"{self.text.prefix}{LATENT}": latent}

    def encode_text(self, networks: Networks, tokens: Tree) -> dict[str, jax.Array]:
        """Token ids and masks `[B, L]` to what is stored of a caption."""
        if self.form == "tokens":
            return {name: tokens[name] for name in self.text.specs(1)}
        states = self._arrays(self.text.encode(networks, tokens))
        kept = {name: x if name.endswith("mask") else x.astype(self.dtype) for name, x in states.items()}
        return {f"{self.text.prefix}{name}": x for name, x in kept.items()}

    def describe(self) -> dict[str, Any]:
        """What two sets of shards must agree on, as JSON has it."""
        about = {"text": self.form, "dtype": self.dtype, "encoders": self.text.described()}
        if self.images is None:
            return about
        auto = self.images.config.autoencoder
        return {
            **about,
            "latent": {
                "scale": auto.scale,
                "shift": auto.shift,
                "normalisation": auto.normalisation,
                "reduction": auto.reduction,
                "channels": auto.latent_channels,
            },
            "autoencoder": architecture(auto),
        }


def check_made(where: str, stored: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Compares what a section says of stored arrays with what its encoders make.

    Raises:
        ConfigError: they differ; says where.
    """
    for name, value in stored.items():
        if value != made[name]:
            raise ConfigError(
                f"{where}.{name} is {value}, and the networks of {where}.encoders make {made[name]}; make them equal, "
                f"or describe in {where}.encoders those that made what is stored"
            )


def latent_sizes(codec: CodecConfig) -> dict[str, int]:
    """What a stored kind's config says of the latents of an autoencoder."""
    return {"reduction": codec.autoencoder.reduction, "latent_channels": codec.autoencoder.latent_channels}


def zero_pooled(states: jax.Array) -> jax.Array:
    """The pooled text of an encoder whose pooled text is not read: `[B, 0]`."""
    return jnp.zeros((states.shape[0], 0), states.dtype)
