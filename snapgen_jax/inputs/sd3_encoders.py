"""Images and captions through the frozen encoders of Stable Diffusion 3.5, inside the step: its autoencoder, CLIP-L,
CLIP-bigG and T5-XXL (Esser et al. 2024, arXiv 2403.03206, section 4).

Nothing joins them that is trained: it is what a published teacher reads. A dropped caption leaves zeros that are
masked, as Stable Diffusion 3 was trained (section B.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.diffusion.guidance import draw_kept, keep
from snapgen_jax.inputs._images import ImageCodec, OfImages, Size, image_specs
from snapgen_jax.inputs._text_encoders import TextEncoders, all_named, text_encoder
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree, is_kept
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.context import sd3_context
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.networks.t5 import T5Config
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import InputsExport

SD3_TEXTS = ("clip_l", "clip_g", "t5")


@dataclasses.dataclass(frozen=True)
class SD3FrozenConfig:
    """The frozen encoders of Stable Diffusion 3.5, and where their published weights are.

    Attributes:
        codec: the autoencoder; `codec.workdir` names the folder of its weights.
        clip_l, clip_g, t5: the text encoders.
        clip_l_folder, clip_g_folder, t5_folder: local folders of their safetensors files.
        clip_l_tokenizer, clip_g_tokenizer, t5_tokenizer: local folders of their tokenizers.
        t5_tokens: length of a caption for T5.
        stand_ins: draws all of them instead of reading them. Where no tokenizer is named either, words stand for random
            ids.
    """

    codec: CodecConfig = CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("sd3"))
    clip_l: ClipTextConfig = ClipTextConfig.preset("clip_l")
    clip_g: ClipTextConfig = ClipTextConfig.preset("clip_g")
    t5: T5Config = T5Config.preset("xxl")
    clip_l_folder: str = ""
    clip_g_folder: str = ""
    t5_folder: str = ""
    clip_l_tokenizer: str = ""
    clip_g_tokenizer: str = ""
    t5_tokenizer: str = ""
    t5_tokens: int = 256
    stand_ins: bool = False

    def __post_init__(self) -> None:
        check(self, t5_tokens=at_least(1))

    def context(self) -> dict[str, int]:
        """The sizes of what the network attends to."""
        pooled = sum(clip.projection or clip.width for clip in (self.clip_l, self.clip_g))
        return {
            "context_tokens": self.clip_l.max_tokens + self.t5_tokens,
            "context_width": self.t5.width,
            "pooled_width": pooled,
        }

    def text(self, platform: Platform, prefix: str) -> TextEncoders:
        """The text encoders. T5 attends to its padding, as in the reference."""
        encoders = {
            "clip_l": text_encoder(self, "clip_l", "clip_l", self.clip_l.max_tokens),
            "clip_g": text_encoder(self, "clip_g", "clip_g", self.clip_g.max_tokens),
            "t5": text_encoder(self, "t5", "t5_xxl", self.t5_tokens),
        }
        return TextEncoders(encoders, self.stand_ins, platform, prefix)

    def named(self) -> bool:
        """Whether all weights and tokenizers are at hand: folders are named, or stand-ins asked for."""
        return all_named(self, SD3_TEXTS)


@dataclasses.dataclass(frozen=True)
class SD3EncodersConfig(SD3FrozenConfig):
    """The encoders inside the step.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        caption_dropout: share of captions whose states are replaced by none: zeros that are masked.
        prefix: begins the name of every array of token ids: "teacher_" for a teacher's.
    """

    kind: Literal["sd3_encoders"] = "sd3_encoders"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    caption_dropout: float = 0.1
    prefix: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, image_sizes=at_least(1), caption_dropout=SHARE)

    def build(self, batch_size: int, platform: Platform) -> SD3Encoders:
        """Raises `ValueError` where an image size does not divide as the codec needs."""
        return SD3Encoders(self, batch_size, platform)


class SD3Encoders(OfImages):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: SD3EncodersConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.images = ImageCodec(config.codec, platform, config.image_sizes)
        self.text = config.text(platform, config.prefix)

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`; after the prefix token ids int32 `clip_l`, `clip_g`
        and `t5` `[B, L]`, each by the tokenizer of its encoder."""
        return image_specs(self.batch_size, self.config.image_sizes, self.text.specs(self.batch_size))

    def conditions(self) -> tuple[str, ...]:
        """The token ids of each encoder."""
        return tuple(self.text.specs(1))

    def networks(self) -> dict[str, Network]:
        """The text encoders and "codec"."""
        return {**self.text.networks(), **self.images.networks()}

    def pretrained(self) -> tuple[str, ...]:
        """All."""
        return tuple(self.networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the encoders and the autoencoder onto the mesh, slice by slice; or draws all of them as stand-ins."""
        return self.text.load(roles, self.images, mesh)

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """Those of the published encoders."""
        return self.text.tokenizers()

    # --- conditions ---

    def unconditional_share(self) -> float:
        """`caption_dropout`."""
        return self.config.caption_dropout

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{"text": bool [B]}`, false with probability `caption_dropout`."""
        return {"text": draw_kept(key, batch_size, self.config.caption_dropout)}

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """What the encoders make of the captions, zeros where the text is not kept."""
        del key
        return keep_text(sd3_states(self.text, networks, batch), kept)

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """The text states in float32."""
        del networks
        return TextContext(*(drawn[name].astype(jnp.float32) for name in ("sequence", "mask", "pooled")))

    def null_condition(self, networks: Networks) -> TextContext:
        """Zeros that are masked, `[1, ...]`."""
        del networks
        return null_text(**self.config.context())

    # --- out again ---

    def exports(self) -> InputsExport:
        """A phone does not hold encoders of this size.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError(
            "the text encoders of Stable Diffusion 3.5 are too large for a bundle; export a run whose inputs are "
            "'captions', which trains a small one"
        )


def sd3_states(text: TextEncoders, networks: Networks, batch: Tree) -> dict[str, jax.Array]:
    """`sequence` `[B, L, D]`, `mask` `[B, L]` and `pooled` `[B, P]` of token ids."""
    encoded = text.encode(networks, batch)
    context = sd3_context(*(encoded[name] for name in SD3_TEXTS))
    return {"sequence": context.sequence, "mask": context.mask, "pooled": context.pooled}


def keep_text(states: Mapping[str, jax.Array], kept: Mapping[str, jax.Array]) -> Tree:
    """The states, zeros that are masked where the text is not kept."""
    rows = is_kept(kept, "text")
    if rows is None:
        return dict(states)
    return keep(rows, dict(states), jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), dict(states)))


def null_text(context_tokens: int, context_width: int, pooled_width: int) -> TextContext:
    """Zeros that are masked, `[1, ...]`."""
    shapes: Any = (context_tokens, context_width), (context_tokens,), (pooled_width,)
    return TextContext(*(jnp.zeros((1, *shape)) for shape in shapes))
