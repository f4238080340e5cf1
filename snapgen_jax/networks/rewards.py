"""Rewards: what a picture is worth to a model of people's taste, and how well it fits its text.

Each is `R(images, tokens) -> [B]`, differentiable by the images, with the preprocessing of its reference inside.

| preset | reward | reference |
|---|---|---|
| `aesthetic` | a linear reading of CLIP-L's embedding, about 1 to 10; reads no text | LAION's improved predictor |
| `pickscore` | scaled cosine of a fine-tuned CLIP-H, about 15 to 25 | Kirstain et al. 2023, arXiv 2305.01569 |
| `hpsv2` | cosine of a fine-tuned CLIP-H, about 0.2 to 0.35 | Wu et al. 2023, arXiv 2306.09341 |
| `clip_l`, `clip_h` | cosine of CLIP itself | Radford et al. 2021 |
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.layers import Linear
from snapgen_jax.networks.module import Preset, Rules

__all__ = ["Reward", "RewardConfig", "preprocess"]

Preprocessing = Literal["transformers", "torchvision", "hpsv2", "signed"]
# Of the photographs that CLIP was trained on.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ROUNDING = 2e-6
LOGIT_SCALE = 2.6592  # log(1 / 0.07), where CLIP's training begins


@dataclasses.dataclass(frozen=True)
class RewardConfig(Preset):
    """Architecture of a `Reward`. The defaults are the cosine of CLIP-L.

    Attributes:
        vision: the image encoder.
        text: the text encoder; None where the reward does not read the text.
        score: what is made of the embeddings, both of unit length: their product ("cosine"), the same times a learnt
            factor ("scaled"), or a chain of linear layers from the image's embedding ("linear").
        hidden: widths of that chain between the embedding and the one number.
        preprocessing: how an image comes to the encoder's size, see `preprocess`.
        padding: whether the text encoder sees the padding of a text ("seen", as the published ones do), or not
            ("hidden", as one of a contrastive run of ours).
    """

    kind: Literal["reward"] = "reward"
    vision: ClipVisionConfig = ClipVisionConfig.preset("l_14")
    text: ClipTextConfig | None = ClipTextConfig.preset("clip_l")
    score: Literal["cosine", "scaled", "linear"] = "cosine"
    hidden: tuple[int, ...] = ()
    preprocessing: Preprocessing = "transformers"
    padding: Literal["seen", "hidden"] = "seen"

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"vision": ClipVisionConfig.preset("smoke"), "text": ClipTextConfig.preset("smoke")},
        "shapes": {"vision": ClipVisionConfig.preset("shapes"), "text": ClipTextConfig.preset("shapes")},
        "clip_l": {},
        "clip_h": {"vision": ClipVisionConfig.preset("h_14"), "text": ClipTextConfig.preset("clip_h")},
        "aesthetic": {
            "text": None,
            "score": "linear",
            "hidden": (1024, 128, 64, 16),
            "preprocessing": "torchvision",
        },
        "pickscore": {
            "vision": ClipVisionConfig.preset("h_14"),
            "text": ClipTextConfig.preset("clip_h"),
            "score": "scaled",
        },
        "hpsv2": {
            "vision": ClipVisionConfig.preset("h_14"),
            "text": ClipTextConfig.preset("clip_h"),
            "preprocessing": "hpsv2",
        },
    }

    def __post_init__(self):
        if (self.text is None) != (self.score == "linear"):
            raise ValueError(
                f"RewardConfig: score={self.score!r} with text={'None' if self.text is None else 'an encoder'}; "
                "'linear' reads the image alone, and the others need a text encoder"
            )
        if self.text is not None and self.text.projection != self.vision.projection:
            raise ValueError(
                f"RewardConfig: the image's embedding is {self.vision.projection} wide and the text's "
                f"{self.text.projection}; give both encoders of one CLIP"
            )

    @property
    def dtype(self) -> Literal["auto", "float32", "bfloat16"]:
        """In which the image encoder computes."""
        return self.vision.dtype

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the reward with freshly drawn parameters."""
        return Reward(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return [*self.vision.rules(), *(self.text.rules() if self.text else ())]

    def input_spec(
        self, batch: int = 1, height: int | None = None, width: int | None = None, tokens: int = 77
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`ShapeDtypeStruct`s of a `Reward`'s positional arguments: images and tokens."""
        size = self.vision.image_size
        height, width = (size if side is None else side for side in (height, width))
        length = min(tokens, self.text.max_tokens) if self.text else tokens
        images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
        return images, jax.ShapeDtypeStruct((batch, length), jnp.int32)


class Reward(nnx.Module):
    """Images and texts to numbers. Build it through `networks.module.build`."""

    def __init__(self, config: RewardConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = config.vision.module(rngs)
        self.text = config.text.module(rngs) if config.text else None
        self.logit_scale = nnx.Param(jnp.full((), LOGIT_SCALE)) if config.score == "scaled" else None
        widths = (config.vision.projection, *config.hidden, 1)
        layers = itertools.pairwise(widths) if config.score == "linear" else ()
        self.head = nnx.List([Linear(before, after, rngs=rngs) for before, after in layers])

    def __call__(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rewards images.

        Args:
            images: `[B, H, W, 3]` float32 in [0, 1], of any size.
            tokens: `[B, L]` int32 of the texts, padded as the encoder's tokenizer does; not read by "linear".

        Returns:
            `[B]` float32.
        """
        config = self.config
        size = config.vision.image_size
        image = _unit(self.vision(preprocess(images, size, config.preprocessing)))  # type: ignore[operator]
        if self.text is None:
            for layer in self.head:
                image = layer(image)
            return image[:, 0]
        assert config.text is not None
        seen = jnp.ones(tokens.shape) if config.padding == "seen" else tokens != config.text.pad_id
        text = _unit(self.text(tokens, seen.astype(jnp.float32)).pooled)  # type: ignore[operator]
        cosine = jnp.sum(image * text, axis=-1)
        return cosine if self.logit_scale is None else jnp.exp(self.logit_scale[...].astype(jnp.float32)) * cosine


def _unit(x: jax.Array) -> jax.Array:
    """Vectors `[B, D]` of unit length; float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def preprocess(images: jax.Array, size: int, form: Preprocessing = "transformers") -> jax.Array:
    """Images as a published CLIP takes them: resized, of one square size, and normalised.

    The references resize images of 8 bits, and round to them; nothing is rounded here, so that there is a gradient.

    Args:
        images: `[B, H, W, 3]` float32 in [0, 1].
        size: S, side of the encoder's images.
        form: "transformers" resizes the shorter side to S, clips what bicubic interpolation overshoots along each axis,
            and crops the middle. "torchvision", in the code of the first CLIP, does so too, but rounds the offset of
            the crop to even where it is a half, instead of down. "hpsv2" resizes the longer side to S, does not clip,
            and puts black around, as that reward was trained. "signed" is "transformers" to [-1, 1] without CLIP's mean
            and deviation, as a contrastive run of ours reads its images.

    Returns:
        `[B, S, S, 3]` float32.
    """
    height, width = images.shape[1:3]
    if form == "hpsv2":
        factor = size / max(height, width)
        resized = [max(1, round(side * factor)) for side in (height, width)]
        images = _resize(_resize(images, 2, resized[1]), 1, resized[0])
        missing = [size - side for side in resized]
        images = jnp.pad(images, ((0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)))
    else:
        resized = [int(size * side / min(height, width)) for side in (height, width)]
        half = round if form == "torchvision" else int
        top, left = (half((side - size) / 2) for side in resized)
        images = _clip(_resize(_clip(_resize(images, 2, resized[1])), 1, resized[0]))
        images = images[:, top : top + size, left : left + size]
    if form == "signed":
        return 2 * images - 1
    return (images - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)


def _resize(images: jax.Array, axis: int, size: int) -> jax.Array:
    """Bicubic (a = -1/2) interpolation along one axis, whose kernel widens where it shrinks an image."""
    shape = (*images.shape[:axis], size, *images.shape[axis + 1 :])
    return images if images.shape == shape else jax.image.resize(images, shape, "cubic", antialias=True)


def _clip(images: jax.Array) -> jax.Array:
    """To [0, 1]. What a rounding error took out of it passes its gradient: most of a white area would have none."""
    clipped = jnp.clip(images, 0, 1)
    inside = jnp.abs(images - clipped) < _ROUNDING
    return jnp.where(inside, images + jax.lax.stop_gradient(clipped - images), jax.lax.stop_gradient(clipped))
