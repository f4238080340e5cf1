"""The CLIP image encoder: a vision transformer (Radford et al. 2021, section 2.4; Dosovitskiy et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.clip import ClipLayer
from snapgen_jax.networks.layers import Conv, LayerNorm, Linear
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, draw, shard

__all__ = ["ClipVision", "ClipVisionConfig"]

_RULES: Rules = [
    (r"(query|key|value|inner)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|outer|projection)/kernel$", PartitionSpec("tensor", "fsdp")),
]

_PUBLISHED: dict[str, Any] = {"image_size": 224, "patch": 14, "key_bias": True}
_L: dict[str, Any] = {"width": 1024, "layers": 24, "heads": 16, "projection": 768}
_LARGE: dict[str, Any] = {"heads": 16, "activation": "gelu"}


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(Preset):
    """Architecture of a `ClipVision`. The defaults are those of the shapes world.

    Attributes:
        image_size, patch: sides of the image and of its patches, in pixels.
        width, layers, heads: of the transformer.
        ffn_width: hidden width of the feed-forward networks; None for four times the width. Two published networks have
            another (4.3637 and 4.9231 times, rounded down).
        projection: width of the embedding.
        activation, key_bias: as for `ClipTextConfig`.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["clip_vision"] = "clip_vision"
    image_size: int = 32
    patch: int = 4
    width: int = 128
    layers: int = 3
    heads: int = 4
    ffn_width: int | None = None
    projection: int = 128
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    key_bias: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if self.width % self.heads or self.image_size % self.patch:
            raise ValueError(
                f"ClipVisionConfig: heads={self.heads} must divide width={self.width}, and patch={self.patch} the "
                f"image_size={self.image_size}"
            )

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward networks."""
        return 4 * self.width if self.ffn_width is None else self.ffn_width

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the image encoder with freshly drawn parameters."""
        return ClipVision(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct]:
        """`ShapeDtypeStruct` of a `ClipVision`'s positional argument."""
        return (jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 3), jnp.float32),)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"patch": 8, "width": 16, "layers": 1, "heads": 2, "projection": 16},
        "shapes": {},
        "l_14": {**_PUBLISHED, **_L},
        "l_14_336": {**_PUBLISHED, **_L, "image_size": 336},
        "h_14": {**_PUBLISHED, "width": 1280, "layers": 32, "heads": 16, "projection": 1024, "activation": "gelu"},
        "g_14": {**_PUBLISHED, **_LARGE, "width": 1408, "layers": 40, "ffn_width": 6144, "projection": 1024},
        "big_g_14": {**_PUBLISHED, **_LARGE, "width": 1664, "layers": 48, "ffn_width": 8192, "projection": 1280},
    }


class ClipVision(nnx.Module):
    """Images to embeddings. Build it through `networks.module.build`."""

    def __init__(self, config: ClipVisionConfig, rngs: nnx.Rngs):
        width, dtype = config.width, compute_dtype(config)
        cells = (config.image_size // config.patch) ** 2
        normal = nnx.initializers.normal(width**-0.5)
        self.config = config
        self.patch = Conv(
            3, width, config.patch, stride=config.patch, padding=(0, 0), bias=False, dtype=dtype, rngs=rngs
        )
        self.class_embedding = draw(rngs, normal, (width,))
        self.position_embedding = draw(rngs, normal, (1 + cells, width))
        self.norm_in = LayerNorm(width, dtype=dtype)
        self.layers = nnx.List([ClipLayer(config, rngs) for _ in range(config.layers)])
        self.norm = LayerNorm(width, dtype=dtype)
        self.projection = Linear(width, config.projection, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embeds images.

        Args:
            images: `[B, H, W, 3]` float32, H = W = `image_size`: in [-1, 1] for an encoder of ours, and as
                `rewards.preprocess` makes them for a published one.

        Returns:
            `[B, projection]` float32, of any length.

        Raises:
            ValueError: the images have another size.
        """
        config = self.config
        if images.shape[1:3] != (config.image_size,) * 2:
            raise ValueError(f"ClipVision: images of {images.shape[1:3]} px given, but image_size={config.image_size}")
        cells = rearrange(self.patch(shard(images, "image")), "b h w c -> b (h w) c")
        first = jnp.broadcast_to(self.class_embedding[...].astype(cells.dtype), (len(images), 1, config.width))
        x = jnp.concatenate([first, cells], axis=1) + self.position_embedding[...].astype(cells.dtype)
        x = shard(self.norm_in(x), "tokens")
        for layer in self.layers:
            x = layer(x, None)
        return self.projection(self.norm(x[:, 0])).astype(jnp.float32)
