"""Images and captions through published encoders, which run frozen inside the step: the autoencoder of Stable
Diffusion 3, CLIP-L, CLIP-bigG and Gemma-2-2b (SnapGen, arXiv 2412.09619, section 3.1).

A conditioner, which is trained, joins the three encodings of a caption. Each encoder is left out of an example now and
then, independently, so that the network draws from any of them, and without guidance from none. Parameters are in the
dtype in which they compute, and split over the `fsdp` axis of the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.inputs._encodings import CONDITIONER, DropRates, Encoding, Encodings, OfEncodings, clip_mask
from snapgen_jax.inputs._images import ImageCodec, OfImages, Size, image_specs
from snapgen_jax.inputs._published_export import published_export
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.training.exports import InputsExport
from snapgen_jax.weights.frozen import draw_stand_ins, load_text_encoder

PUBLISHED = {"clip_l": "clip_l", "clip_g": "clip_g", "language": "gemma2_2b"}  # encoder -> whose weights it has


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """The encoders, and where their published weights are.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        codec: the autoencoder; `codec.workdir` names the folder of its weights.
        clip_l, clip_g, language: the text encoders.
        use: which of the encoders there are. The others are left out of every example, as `encoder_dropout` leaves them
            out of some: so a network that was trained with all of them draws where only these are at hand.
        clip_l_folder, clip_g_folder, language_folder: local folders of their safetensors files.
        clip_l_tokenizer, clip_g_tokenizer, language_tokenizer: local folders of their tokenizers.
        language_tokens: length of a caption for the language model.
        conditioner: joins what they say.
        encoder_dropout: share of examples from which an encoder is left out, each independently: one number, or those
            of CLIP-L, CLIP-bigG and the language model.
        caption_dropout: share of examples that keep no encoder, for guidance; None for what independent rates leave.
        stand_ins: draws the encoders and the autoencoder instead of reading them. A run then shows speed and memory,
            and trains nothing of use.
    """

    kind: Literal["encoders"] = "encoders"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    codec: CodecConfig = CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("sd3"))
    clip_l: ClipTextConfig = ClipTextConfig.preset("clip_l")
    clip_g: ClipTextConfig = ClipTextConfig.preset("clip_g")
    language: Gemma2Config = Gemma2Config.preset("gemma2_2b")
    use: tuple[str, ...] = ENCODERS
    clip_l_folder: str = ""
    clip_g_folder: str = ""
    language_folder: str = ""
    clip_l_tokenizer: str = ""
    clip_g_tokenizer: str = ""
    language_tokenizer: str = ""
    language_tokens: int = 128
    conditioner: ConditionerConfig = ConditionerConfig.preset("t2i")
    encoder_dropout: DropRates = 0.464
    caption_dropout: float | None = None
    stand_ins: bool = False

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1), language_tokens=at_least(1), encoder_dropout=SHARE, caption_dropout=SHARE)
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
        self.encoders = {name: build(for_platform(getattr(config, name), platform))[0] for name in self.use}
        shapes = {"language": Encoding(config.language_tokens, config.language.width)}
        for name, clip in (("clip_l", config.clip_l), ("clip_g", config.clip_g)):
            shapes[name] = Encoding(clip.max_tokens, clip.width, clip.projection or clip.width)
        self.encodings = Encodings(config.conditioner, shapes, config.encoder_dropout, config.caption_dropout, platform)

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`; token ids int32 `clip_l` and `clip_g` `[B, 77]` and
        `language` `[B, M]`, each by the tokenizer of its encoder; `language_mask` float32 `[B, M]`."""
        b = self.batch_size
        tokens = {name: jax.ShapeDtypeStruct((b, s.length), jnp.int32) for name, s in self.tokenizers().items()}
        mask = jax.ShapeDtypeStruct((b, self.config.language_tokens), jnp.float32)
        return image_specs(
            b, self.config.image_sizes, tokens | ({"language_mask": mask} if "language" in tokens else {})
        )

    def conditions(self) -> tuple[str, ...]:
        """The token ids of each encoder, and the mask of the language model's."""
        return (*self.use, *(["language_mask"] if "language" in self.use else []))

    def networks(self) -> dict[str, Network]:
        """The text encoders, "codec", and "conditioner"."""
        return {**self.encoders, **self.images.networks(), CONDITIONER: self.encodings.network}

    def pretrained(self) -> tuple[str, ...]:
        """All but the conditioner."""
        return (*self.use, *self.images.networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the encoders and the autoencoder onto the mesh, slice by slice; or draws all of them as stand-ins."""
        if self.config.stand_ins:
            frozen = {**self.encoders, **self.images.networks()}
            drawn = draw_stand_ins(frozen, rules_of(frozen), mesh)
            return {role: drawn[role] for role in roles}
        loaded = {
            name: load_text_encoder(network, PUBLISHED[name], getattr(self.config, f"{name}_folder"), mesh)
            for name, network in self.encoders.items()
            if name in roles
        }
        return {**loaded, **self.load_codec(roles, mesh)}

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """Those of the published encoders."""
        config = self.config
        lengths = {"clip_l": config.clip_l.max_tokens, "clip_g": config.clip_g.max_tokens}
        lengths["language"] = config.language_tokens
        return {
            name: TokenizerSpec(
                "pretrained",
                lengths[name],
                getattr(config, name).vocab_size,
                folder=getattr(config, f"{name}_tokenizer"),
            )
            for name in self.use
        }

    # --- examples and conditions ---

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """What the encoders make of the captions, and which of them each example keeps."""
        del key
        masks = {name: clip_mask(batch[name]) for name in self.use if name != "language"}
        if "language" in self.use:
            masks["language"] = batch["language_mask"]
        encoded = {
            name: apply(network, networks[name], batch[name], masks[name]) for name, network in self.encoders.items()
        }
        rows = batch[self.use[0]].shape[0]
        missing = {name: self.encodings.nothing(name, rows) for name in ENCODERS if name not in self.use}
        told = self.told({**encoded, **missing}, kept)
        if not missing:
            return told
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
            {name: network.config for name, network in self.encoders.items()},
            {name: spec.length for name, spec in self.tokenizers().items()},
            (CONDITIONER, self.encodings.network.config),
            {name: (shape.tokens, shape.width, shape.pooled) for name, shape in self.encodings.shapes.items()},
            self.images,
        )
