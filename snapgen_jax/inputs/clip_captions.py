"""Images, and captions through the published CLIP-L alone, which runs frozen inside the step.

What class-conditional ImageNet is trained on: "a photo of a tench" in place of a label (SnapGen, arXiv 2412.09619,
section 3.1), and the autoencoder of Stable Diffusion 1. A dropped caption leaves zeros that are masked, as in
`encoders.py`, or the empty prompt, by which Stable Diffusion 1 was trained. Where latents were stored beforehand, see
`stored_clip_captions.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
from snapgen_jax.networks.clip import ClipTextConfig, null_tokens
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import Network, Platform, apply, build
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportUnit, InputsExport

CLIP = "clip_l"  # the role of the encoder, and the array of its token ids
OF_CLIP = ("clip_captions", "stored_clip_captions")  # kinds of inputs
Null = Literal["zeros", "empty_prompt"]


@dataclasses.dataclass(frozen=True)
class ClipFrozenConfig:
    """CLIP-L and an autoencoder, and where their published weights are.

    Attributes:
        codec: the autoencoder; `codec.workdir` names the folder of its weights.
        clip_l: the text encoder.
        clip_l_folder: local folder of its safetensors files.
        clip_l_tokenizer: local folder of its tokenizer.
        stand_ins: draws both instead of reading them. A run then shows speed and memory, and trains nothing of use.
            Where no tokenizer is named either, words stand for random ids.
    """

    codec: CodecConfig = CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("sd1"))
    clip_l: ClipTextConfig = ClipTextConfig.preset("clip_l")
    clip_l_folder: str = ""
    clip_l_tokenizer: str = ""
    stand_ins: bool = False

    def text(self, platform: Platform) -> TextEncoders:
        """The text encoder."""
        clip = text_encoder(self, CLIP, "clip_l", self.clip_l.max_tokens)
        return TextEncoders({CLIP: clip}, self.stand_ins, platform)

    def named(self) -> bool:
        """Whether all weights and the tokenizer are at hand: folders are named, or stand-ins asked for."""
        return all_named(self, (CLIP,))


@dataclasses.dataclass(frozen=True)
class ClipCaptionsConfig(ClipFrozenConfig):
    """Both inside the step.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        caption_dropout: share of captions that are replaced by none, for guidance.
        null: what is attended to without a caption: zeros that are masked, or what CLIP-L makes of the empty prompt. A
            network that goes on from a published Stable Diffusion 1 knows the latter.
    """

    kind: Literal["clip_captions"] = "clip_captions"
    image_sizes: tuple[Size, ...] = ((256, 256),)
    caption_dropout: float = 0.1
    null: Null = "zeros"

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1), caption_dropout=SHARE)

    def build(self, batch_size: int, platform: Platform) -> ClipCaptions:
        """Raises `ValueError` where an image size does not divide as the codec needs."""
        return ClipCaptions(self, batch_size, platform)


class OfClip:
    """The part of an `Inputs` that reads captions through CLIP-L inside the step.

    Attributes:
        config: with `caption_dropout` and `null`.
        text: the encoder.
    """

    config: Any
    text: TextEncoders

    def conditions(self) -> tuple[str, ...]:
        """The token ids."""
        return (CLIP,)

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """That of CLIP-L."""
        return self.text.tokenizers()

    def unconditional_share(self) -> float:
        """`caption_dropout`."""
        return self.config.caption_dropout

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{"clip_l": bool [B]}`, false with probability `caption_dropout`."""
        return {CLIP: draw_kept(key, batch_size, self.config.caption_dropout)}

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """What CLIP-L makes of the captions, the null condition where they are not kept."""
        del key
        context, rows = self.text.encode(networks, batch)[CLIP], is_kept(kept, CLIP)
        return context if rows is None else keep(rows, context, self.null_condition(networks))

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """The same: the text encoder is not trained."""
        del networks
        return drawn

    def null_condition(self, networks: Networks) -> TextContext:
        """Zeros that are masked, or the states of the empty prompt, `[1, ...]`."""
        if self.config.null == "zeros":
            return self.zeros()
        return self.text.encode(networks, {CLIP: jnp.asarray(self.empty_prompt())[None]})[CLIP]

    def empty_prompt(self) -> np.ndarray:
        """Its token ids, int32 `[L]`."""
        clip = self.text.encoders[CLIP].config
        return null_tokens(clip, clip.max_tokens)[0]

    def zeros(self) -> TextContext:
        """Zeros in the shape of the states of one caption, `[1, ...]`."""
        clip = self.text.encoders[CLIP].config
        shapes = (clip.max_tokens, clip.width), (clip.max_tokens,), (clip.projection or clip.width,)
        return TextContext(*(jnp.zeros((1, *shape)) for shape in shapes))

    def check_null(self, workdir: str, inputs: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Raises `ConfigError` where an earlier run, as for `check_run`, had another null condition."""
        theirs = inputs.get("null", "zeros")
        if "condition" in parts and inputs.get("kind") in OF_CLIP and theirs != self.config.null:
            raise ConfigError(
                f"the run {workdir!r} was trained with inputs.null={theirs!r}, and here it is {self.config.null!r}; "
                "make them equal"
            )


class ClipCaptions(OfClip, OfImages):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: ClipCaptionsConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.images = ImageCodec(config.codec, platform, config.image_sizes)
        self.text = config.text(platform)

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`, and `clip_l`, the token ids int32 `[B, 77]`."""
        return image_specs(self.batch_size, self.config.image_sizes, self.text.specs(self.batch_size))

    def networks(self) -> dict[str, Network]:
        """ "clip_l", and "codec" where that is a network."""
        return {**self.text.networks(), **self.images.networks()}

    def pretrained(self) -> tuple[str, ...]:
        """All."""
        return tuple(self.networks())

    def check_run(self, workdir: str, inputs: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Raises `ConfigError` where an earlier run had other latents, or another null condition."""
        super().check_run(workdir, inputs, parts)
        self.check_null(workdir, inputs, parts)

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads text encoder and autoencoder onto the mesh, slice by slice; or draws both as stand-ins."""
        return self.text.load(roles, self.images, mesh)

    def exports(self) -> InputsExport:
        """CLIP-L, and the decoder where the codec is a network."""
        clip = self.config.clip_l
        unit = ExportUnit(
            "text_encoder",
            functools.partial(_encode, dataclasses.replace(clip, dtype="float32")),
            (CLIP,),
            {CLIP: jax.ShapeDtypeStruct((1, clip.max_tokens), jnp.int32)},
        )
        context = jax.eval_shape(self.zeros)
        nothing = {name: np.zeros(x.shape[1:], np.float32) for name, x in vars(context).items()}
        return InputsExport(
            [unit],
            {CLIP: self.empty_prompt()},
            self.images.describe(),
            self.images.export_unit(),
            tokenizers=[{"file": f"tokenizers/{CLIP}.json", "tokens": CLIP}],
            null_context=nothing if self.config.null == "zeros" else {},
            context=context,
        )


def _encode(config: ClipTextConfig, weights: Tree, *, clip_l: jax.Array) -> dict[str, jax.Array]:
    """Token ids int32 `[1, L]` to sequence `[1, L, D]`, mask `[1, L]` and pooled `[1, P]`."""
    context = apply(build(config)[0], weights[CLIP], clip_l, jnp.ones(clip_l.shape))
    return {"sequence": context.sequence, "mask": context.mask, "pooled": context.pooled}
