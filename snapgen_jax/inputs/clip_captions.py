"""Captions through the published CLIP-L, frozen inside the step, beside images or stored latents.

What class-conditional ImageNet is trained on: "a photo of a tench" in place of a label (SnapGen, arXiv 2412.09619,
section 3.1), and the autoencoder of Stable Diffusion 1. A dropped caption leaves zeros that are masked, as in
`encoders.py`. Class names are few and their states fifteen times the size of a latent at 256 px, so that stored
examples hold token ids: CLIP-L is a twentieth of a training step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.diffusion.guidance import draw_kept, keep
from snapgen_jax.inputs._encodings import clip_mask
from snapgen_jax.inputs._images import ImageCodec, OfImages, Size, bucket_name, image_specs
from snapgen_jax.inputs._latents import LATENT
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree, is_kept
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exports import ExportUnit, InputsExport
from snapgen_jax.weights.frozen import draw_stand_ins, load_text_encoder

CLIP = "clip_l"  # the role of the encoder, and the array of its token ids


@dataclasses.dataclass(frozen=True)
class ClipCaptionsConfig:
    """CLIP-L and an autoencoder, and where their published weights are.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        latents: "images" are encoded inside the step; "stored" latents were encoded beforehand, and the autoencoder
            only decodes what is drawn.
        codec: the autoencoder; `codec.workdir` names the folder of its weights.
        clip_l: the text encoder.
        clip_l_folder: local folder of its safetensors files.
        clip_l_tokenizer: local folder of its tokenizer.
        caption_dropout: share of captions that are replaced by none, for guidance.
        stand_ins: draws text encoder and autoencoder instead of reading them. A run then shows speed and memory, and
            trains nothing of use.
    """

    kind: Literal["clip_captions"] = "clip_captions"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    latents: Literal["images", "stored"] = "images"
    codec: CodecConfig = CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("sd1"))
    clip_l: ClipTextConfig = ClipTextConfig.preset("clip_l")
    clip_l_folder: str = ""
    clip_l_tokenizer: str = ""
    caption_dropout: float = 0.1
    stand_ins: bool = False

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1), caption_dropout=SHARE)

    def build(self, batch_size: int, platform: Platform) -> ClipCaptions:
        """Raises `ValueError` where an image size does not divide as the codec needs."""
        return ClipCaptions(self, batch_size, platform)


class ClipCaptions(OfImages):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: ClipCaptionsConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.images = ImageCodec(config.codec, platform, config.image_sizes)
        self.text = build(for_platform(config.clip_l, platform))[0]

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `clip_l`, the token ids int32 `[B, 77]`, beside `image` uint8 `[B, H, W, 3]`, or
        `latent` bfloat16 `[B, h, w, c]` where latents are stored, scaled as the autoencoder's config says."""
        tokens = {CLIP: jax.ShapeDtypeStruct((self.batch_size, self.config.clip_l.max_tokens), jnp.int32)}
        sizes = self.config.image_sizes
        if self.config.latents == "images":
            return image_specs(self.batch_size, sizes, tokens)

        def latent(size: Size) -> Any:
            return jax.ShapeDtypeStruct((self.batch_size, *self.latent_shape(size)), jnp.bfloat16)

        return {bucket_name(size): {LATENT: latent(size), **tokens} for size in sizes}

    def conditions(self) -> tuple[str, ...]:
        """The token ids."""
        return (CLIP,)

    def networks(self) -> dict[str, Network]:
        """ "clip_l", and "codec" where that is a network."""
        return {CLIP: self.text, **self.images.networks()}

    def pretrained(self) -> tuple[str, ...]:
        """All."""
        return tuple(self.networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads text encoder and autoencoder onto the mesh, slice by slice; or draws both as stand-ins."""
        config, networks = self.config, self.networks()
        if config.stand_ins:
            drawn = draw_stand_ins(networks, rules_of(networks), mesh)
            return {role: drawn[role] for role in roles}
        text = {CLIP: load_text_encoder(self.text, CLIP, config.clip_l_folder, mesh)} if CLIP in roles else {}
        return {**text, **self.load_codec(roles, mesh)}

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """That of CLIP-L."""
        clip = self.config.clip_l
        return {
            CLIP: TokenizerSpec("pretrained", clip.max_tokens, clip.vocab_size, folder=self.config.clip_l_tokenizer)
        }

    # --- examples and conditions ---

    def clean(self, networks: Networks, batch: Tree) -> jax.Array:
        """The latents of the images, or those that are stored."""
        return batch[LATENT].astype(jnp.float32) if self.config.latents == "stored" else super().clean(networks, batch)

    def unconditional_share(self) -> float:
        """`caption_dropout`."""
        return self.config.caption_dropout

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{"clip_l": bool [B]}`, false with probability `caption_dropout`."""
        return {CLIP: draw_kept(key, batch_size, self.config.caption_dropout)}

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """What CLIP-L makes of the captions, zeros that are masked where they are not kept."""
        del key
        context = apply(self.text, networks[CLIP], batch[CLIP], clip_mask(batch[CLIP]))
        rows = is_kept(kept, CLIP)
        return context if rows is None else keep(rows, context, self.null_condition(networks))

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """The same: the text encoder is not trained."""
        del networks
        return drawn

    def null_condition(self, networks: Networks) -> TextContext:
        """Zeros that are masked, `[1, ...]`."""
        del networks
        clip = self.config.clip_l
        shapes = (clip.max_tokens, clip.width), (clip.max_tokens,), (clip.projection or clip.width,)
        return TextContext(*(jnp.zeros((1, *shape)) for shape in shapes))

    # --- out again ---

    def exports(self) -> InputsExport:
        """CLIP-L, and the decoder where the codec is a network."""
        clip = self.config.clip_l
        unit = ExportUnit(
            "text_encoder",
            functools.partial(_encode, dataclasses.replace(clip, dtype="float32")),
            (CLIP,),
            {CLIP: jax.ShapeDtypeStruct((1, clip.max_tokens), jnp.int32)},
        )
        context = jax.eval_shape(self.null_condition, {})
        null = {name: np.zeros(x.shape[1:], np.float32) for name, x in vars(context).items()}
        return InputsExport(
            [unit],
            {CLIP: np.zeros(clip.max_tokens, np.int32)},
            self.images.describe(),
            self.images.export_unit(),
            tokenizers=[{"file": f"tokenizers/{CLIP}.json", "tokens": CLIP}],
            null_context=null,
            context=context,
        )


def _encode(config: ClipTextConfig, weights: Tree, *, clip_l: jax.Array) -> dict[str, jax.Array]:
    """Token ids int32 `[1, L]` to sequence `[1, L, D]`, mask `[1, L]` and pooled `[1, P]`."""
    context = apply(build(config)[0], weights[CLIP], clip_l, clip_mask(clip_l))
    return {"sequence": context.sequence, "mask": context.mask, "pooled": context.pooled}
