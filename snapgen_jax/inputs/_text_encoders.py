"""Published text encoders, frozen: inside the step, or before training to make what is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.inputs._images import ImageCodec
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.text import TextContext
from snapgen_jax.weights.frozen import draw_stand_ins, load_text_encoder


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One text encoder.

    Attributes:
        config: of its network.
        published: whose weights it has, as `weights.sources` calls them.
        folder: local folder of its safetensors files.
        tokenizer: local folder of its tokenizer.
        tokens: length of a caption.
        masked: whether it is told which tokens are padding.
    """

    config: Any
    published: str
    folder: str
    tokenizer: str
    tokens: int
    masked: bool = False


def text_encoder(config: Any, name: str, published: str, tokens: int, masked: bool = False) -> TextEncoder:
    """The text encoder that a config describes by the fields `<name>`, `<name>_folder` and `<name>_tokenizer`."""
    folder, tokenizer = (getattr(config, f"{name}_{what}") for what in ("folder", "tokenizer"))
    return TextEncoder(getattr(config, name), published, folder, tokenizer, tokens, masked)


def all_named(config: Any, names: Sequence[str]) -> bool:
    """Whether the weights of a config's autoencoder, and weights and tokenizers of its text encoders, are at hand:
    folders are named, or stand-ins asked for."""
    folders = [getattr(config, f"{name}_{what}") for name in names for what in ("folder", "tokenizer")]
    return config.stand_ins or all([config.codec.workdir, *folders])


class TextEncoders:
    """Some text encoders and their networks, by role.

    Attributes:
        encoders: those that there are.
    """

    def __init__(self, encoders: Mapping[str, TextEncoder], stand_ins: bool, platform: Platform, prefix: str = ""):
        """`prefix` begins the names of their arrays in a batch."""
        self.encoders, self.stand_ins, self.prefix = dict(encoders), stand_ins, prefix
        self._networks = {
            name: build(for_platform(encoder.config, platform))[0] for name, encoder in self.encoders.items()
        }

    def networks(self) -> dict[str, Network]:
        """`{role: network}`."""
        return dict(self._networks)

    def specs(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Token ids int32 `[B, L]` of each, and of those that read one the mask float32 `[B, L]`."""
        found = {}
        for name, encoder in self.encoders.items():
            shape = (batch_size, encoder.tokens)
            found[f"{self.prefix}{name}"] = jax.ShapeDtypeStruct(shape, jnp.int32)
            if encoder.masked:
                found[f"{self.prefix}{name}_mask"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return found

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """`{array of token ids: its tokenizer}`. Where encoders are drawn and no tokenizer is named, words stand for
        random ids."""
        drawn = self.stand_ins and not any(encoder.tokenizer for encoder in self.encoders.values())
        return {
            f"{self.prefix}{name}": TokenizerSpec(
                "stand_in" if drawn else "pretrained", e.tokens, e.config.vocab_size, folder=e.tokenizer
            )
            for name, e in self.encoders.items()
        }

    def encode(self, networks: Networks, batch: Tree) -> dict[str, TextContext]:
        """What each makes of the token ids of a batch."""

        def encoded(name: str) -> TextContext:
            tokens = batch[f"{self.prefix}{name}"]
            # Where no mask is read every position counts: CLIP and the T5 of Stable Diffusion were used so.
            masked = self.encoders[name].masked
            mask = batch[f"{self.prefix}{name}_mask"] if masked else jnp.ones(tokens.shape, jnp.float32)
            return apply(self._networks[name], networks[name], tokens, mask)

        return {name: encoded(name) for name in self.encoders}

    def load(self, roles: Sequence[str], images: ImageCodec | None, mesh: Mesh | None) -> dict[str, Tree]:
        """Reads those among the roles, and the codec where that is among them, onto the mesh; or draws them.

        Raises:
            ConfigError: a folder is not named, is not there, or holds another network.
        """
        codec = {} if images is None else images.networks()
        if self.stand_ins:
            frozen = {**self._networks, **codec}
            drawn = draw_stand_ins(frozen, rules_of(frozen), mesh)
            return {role: drawn[role] for role in roles}
        loaded = {
            name: load_text_encoder(network, self.encoders[name].published, self.encoders[name].folder, mesh)
            for name, network in self._networks.items()
            if name in roles
        }
        return {**loaded, **(images.load(mesh) if images is not None and set(codec) & set(roles) else {})}

    def described(self) -> dict[str, Any]:
        """The architecture of each and the length of its captions, as JSON has it."""
        return {name: {"tokens": e.tokens, **architecture(e.config)} for name, e in self.encoders.items()}


def architecture(config: Any) -> dict[str, Any]:
    """The fields of a network's config as JSON has them, without those that the platform chooses."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("dtype", "depthwise")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
