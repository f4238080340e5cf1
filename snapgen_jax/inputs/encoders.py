"""Images and captions through published encoders, which run frozen inside the step: the autoencoder of Stable
Diffusion 3, CLIP-L, CLIP-bigG and Gemma-2-2b (SnapGen, arXiv 2412.09619, section 3.1).

A conditioner, which is trained, joins the three encodings of a caption. Each encoder is left out of an example now and
then, independently, so that the network draws from any of them, and without guidance from none. Parameters are in the
dtype in which they compute, and split over the `fsdp` axis of the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.inputs._encodings import CONDITIONER, DropRates, Encoding, Encodings, OfEncodings
from snapgen_jax.inputs._images import ImageCodec, OfImages, Size, image_specs
from snapgen_jax.inputs._published_export import published_export
from snapgen_jax.inputs._text_encoders import TextEncoders, all_named, text_encoder
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.training.exports import InputsExport


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
    """The frozen encoders of SnapGen, and where their published weights are.

    Attributes:
        codec: the autoencoder; `codec.workdir` names the folder of its weights.
        clip_l, clip_g, language: the text encoders.
        clip_l_folder, clip_g_folder, language_folder: local folders of their safetensors files.
        clip_l_tokenizer, clip_g_tokenizer, language_tokenizer: local folders of their tokenizers.
        language_tokens: length of a caption for the language model.
        stand_ins: draws the encoders and the autoencoder instead of reading them. A run then shows speed and memory,
            and trains nothing of use. Where no tokenizer is named either, words stand for random ids.
    """

    codec: CodecConfig = CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("sd3"))
    clip_l: ClipTextConfig = ClipTextConfig.preset("clip_l")
    clip_g: ClipTextConfig = ClipTextConfig.preset("clip_g")
    language: Gemma2Config = Gemma2Config.preset("gemma2_2b")
    clip_l_folder: str = ""
    clip_g_folder: str = ""
    language_folder: str = ""
    clip_l_tokenizer: str = ""
    clip_g_tokenizer: str = ""
    language_tokenizer: str = ""
    language_tokens: int = 128
    stand_ins: bool = False

    def __post_init__(self) -> None:
        check(self, language_tokens=at_least(1))

    def encodings(self) -> dict[str, Encoding]:
        """The shape of what each text encoder makes of a caption."""
        shapes = {
            name: Encoding(clip.max_tokens, clip.width, clip.projection or clip.width)
            for name, clip in (("clip_l", self.clip_l), ("clip_g", self.clip_g))
        }
        return {**shapes, "language": Encoding(self.language_tokens, self.language.width)}

    def text(self, platform: Platform, use: Sequence[str] = ENCODERS) -> TextEncoders:
        """The text encoders, or those in `use`."""
        encoders = {
            "clip_l": text_encoder(self, "clip_l", "clip_l", self.clip_l.max_tokens),
            "clip_g": text_encoder(self, "clip_g", "clip_g", self.clip_g.max_tokens),
            "language": text_encoder(self, "language", "gemma2_2b", self.language_tokens, masked=True),
        }
        return TextEncoders({name: encoders[name] for name in ENCODERS if name in use}, self.stand_ins, platform)

    def named(self) -> bool:
        """Whether all weights and tokenizers are at hand: folders are named, or stand-ins asked for."""
        return all_named(self, ENCODERS)


@dataclasses.dataclass(frozen=True)
class EncodersConfig(FrozenConfig):
    """The encoders inside the step.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        use: which of the encoders there are. The others are left out of every example, as `encoder_dropout` leaves them
            out of some: so a network that was trained with all of them draws where only these are at hand.
        conditioner: joins what they say.
        encoder_dropout: share of examples from which an encoder is left out, each independently: one number, or those
            of CLIP-L, CLIP-bigG and the language model.
        caption_dropout: share of examples that keep no encoder, for guidance; None for what independent rates leave.
    """

    kind: Literal["encoders"] = "encoders"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    use: tuple[str, ...] = ENCODERS
    conditioner: ConditionerConfig = ConditionerConfig.preset("t2i")
    encoder_dropout: DropRates = 0.464
    caption_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, image_sizes=at_least(1), encoder_dropout=SHARE, caption_dropout=SHARE)
        if not self.use or set(self.use) - set(ENCODERS):
            raise ValueError(f"EncodersConfig.use is {self.use}; name at least one of {', '.join(ENCODERS)}")

    def build(self, batch_size: int, platform: Platform) -> Encoders:
        """Raises `ValueError` where the widths of the networks do not fit each other, or an image size the codec."""
        return Encoders(self, batch_size, platform)


class Encoders(OfImages, OfEncodings):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: EncodersConfig, batch_size: int, platform: Platform):
        if config.codec.kind != "autoencoder":
            raise ValueError(
                f"inputs.codec.kind is {config.codec.kind!r}; these images are encoded by an 'autoencoder'"
            )
        self.config, self.batch_size = config, batch_size
        self.images = ImageCodec(config.codec, platform, config.image_sizes)
        self.use = tuple(name for name in ENCODERS if name in config.use)
        self.text = config.text(platform, self.use)
        self.encodings = Encodings(
            config.conditioner, config.encodings(), config.encoder_dropout, config.caption_dropout, platform
        )

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`; token ids int32 `clip_l` and `clip_g` `[B, 77]` and
        `language` `[B, M]`, each by the tokenizer of its encoder; `language_mask` float32 `[B, M]`."""
        return image_specs(self.batch_size, self.config.image_sizes, self.text.specs(self.batch_size))

    def conditions(self) -> tuple[str, ...]:
        """The token ids of each encoder, and the mask of the language model's."""
        return (*self.use, *(["language_mask"] if "language" in self.use else []))

    def networks(self) -> dict[str, Network]:
        """The text encoders, "codec", and "conditioner"."""
        return {**self.text.networks(), **self.images.networks(), CONDITIONER: self.encodings.network}

    def pretrained(self) -> tuple[str, ...]:
        """All but the conditioner."""
        return (*self.use, *self.images.networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the encoders and the autoencoder onto the mesh, slice by slice; or draws all of them as stand-ins."""
        return self.text.load(roles, self.images, mesh)

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """Those of the published encoders."""
        return self.text.tokenizers()

    # --- examples and conditions ---

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """What the encoders make of the captions, and which of them each example keeps."""
        del key
        encoded, rows = self.text.encode(networks, batch), batch[self.use[0]].shape[0]
        if self.use == ENCODERS:
            return self.told(encoded, kept)
        missing = {name: self.encodings.nothing(name, rows) for name in ENCODERS if name not in self.use}
        told = self.told({**encoded, **missing}, kept)
        everything, nothing = jnp.ones(rows), jnp.zeros(rows)
        left = {name: told.get("kept", {}).get(name, everything) if name in encoded else nothing for name in ENCODERS}
        return {**told, "kept": left}

    # --- out again ---

    def exports(self) -> InputsExport:
        """The text encoders in `use`, the conditioner and the decoder.

        Raises:
            ValueError: an encoder is too large for a bundle.
        """
        return published_export(
            {name: network.config for name, network in self.text.networks().items()},
            {name: spec.length for name, spec in self.tokenizers().items()},
            (CONDITIONER, self.encodings.network.config),
            {name: (shape.tokens, shape.width, shape.pooled) for name, shape in self.encodings.shapes.items()},
            self.images,
        )
