"""The discriminator of adversarial step distillation: trained heads on the features of a frozen trunk.

The trunk is any network that returns named features `[B, h, w, C]` (a copy of the student, or the teacher) and is no
part of this file; a head judges one of its depths, at every cell, given the time and the text (Sauer et al. 2023,
"Adversarial Diffusion Distillation", section 3.2; Miyato and Koyama 2018, "cGANs with Projection Discriminator").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.layers import Conv, GroupNorm, Linear
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, shard
from snapgen_jax.networks.unet_blocks import EmbeddingMLP

__all__ = ["Discriminator", "DiscriminatorConfig"]

_RULES: Rules = []  # a few hundred thousand numbers: whole on every device


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(Preset):
    """Heads of a `Discriminator`. The defaults are for the 379M text-to-image UNet as the trunk.

    Attributes:
        taps: names of the trunk's features that are judged.
        channels: width of each of them.
        hidden: width of a head.
        pooled_width, time_width: of the pooled text vector and of the time features.
        embedding_width: of what both become.
        groups: of the GroupNorm that a head begins with.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["discriminator"] = "discriminator"
    taps: tuple[str, ...] = ("down_0", "down_1", "down_2", "mid")
    channels: tuple[int, ...] = (256, 512, 896, 896)
    hidden: int = 64
    pooled_width: int = 2048
    time_width: int = 256
    embedding_width: int = 256
    groups: int = 32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        if len(self.taps) != len(self.channels):
            raise ValueError(
                f"DiscriminatorConfig: {len(self.taps)} taps and {len(self.channels)} channels; give one width a tap"
            )

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the heads with freshly drawn parameters."""
        return Discriminator(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return _RULES

    def input_spec(self, batch: int = 1, height: int = 32, width: int = 32) -> tuple[Any, ...]:
        """`ShapeDtypeStruct`s of a `Discriminator`'s positional arguments, every tap at `height` x `width`."""

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        taps = zip(self.taps, self.channels, strict=True)
        features = {tap: array(batch, height, width, channels) for tap, channels in taps}
        return features, array(batch, self.time_width), array(batch, self.pooled_width)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "taps": ("down_0", "mid"),
            "channels": (8, 16),
            "hidden": 8,
            "pooled_width": 16,
            "time_width": 16,
            "embedding_width": 16,
            "groups": 4,
        },
        "shapes": {
            "taps": ("down_0", "mid", "up_0"),
            "channels": (64, 64, 64),
            "pooled_width": 64,
            "embedding_width": 64,
            "groups": 16,
        },
        "t2i": {},
    }


class Head(nnx.Module):
    """Logits of one depth: `w . h + V e . h` at every cell, of its features h and the embedding e of time and text."""

    def __init__(self, config: DiscriminatorConfig, channels: int, rngs: nnx.Rngs):
        dtype, hidden = compute_dtype(config), config.hidden
        self.norm = GroupNorm(channels, config.groups, dtype=dtype)
        self.conv_1 = Conv(channels, hidden, 1, dtype=dtype, rngs=rngs)
        self.conv_2 = Conv(hidden, hidden, dtype=dtype, rngs=rngs)
        self.logit = Linear(hidden, 1, dtype=dtype, rngs=rngs)
        self.projection = Linear(config.embedding_width, hidden, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """`[B, h, w, C]` and `[B, E]` to `[B, h, w]` float32."""
        h = self.conv_1(jax.nn.silu(self.norm(x)))
        h = jax.nn.silu(self.conv_2(h))
        matched = jnp.einsum("bhwc,bc->bhw", h, self.projection(embedding)) * h.shape[-1] ** -0.5
        return self.logit(h)[..., 0].astype(jnp.float32) + matched.astype(jnp.float32)


class Discriminator(nnx.Module):
    """Real or generated, cell by cell at several depths. Build it through `networks.module.build`."""

    def __init__(self, config: DiscriminatorConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config)
        self.config = config
        self.time = EmbeddingMLP(config.time_width, config.embedding_width, dtype=dtype, rngs=rngs)
        self.pooled = EmbeddingMLP(config.pooled_width, config.embedding_width, dtype=dtype, rngs=rngs)
        self.heads = nnx.List([Head(config, channels, rngs) for channels in config.channels])

    def __call__(self, features: Mapping[str, jax.Array], time: jax.Array, pooled: jax.Array) -> dict[str, jax.Array]:
        """Judges.

        Args:
            features: `{tap: [B, h, w, C]}` of the trunk, at a noisy latent.
            time: `[B, time_width]` from `time_features`, of that noise.
            pooled: `[B, pooled_width]`, the text.

        Returns:
            `{tap: [B, h, w]}` float32 logits, positive for data.

        Raises:
            ValueError: a tap is missing, or another width than the config says.
        """
        given = {tap: features[tap].shape[-1] if tap in features else None for tap in self.config.taps}
        expected = dict(zip(self.config.taps, self.config.channels, strict=True))
        if given != expected:
            raise ValueError(f"Discriminator: the trunk's features have widths {given}, the config says {expected}")
        embedding = jax.nn.silu(shard(self.time(time) + self.pooled(pooled), "vector"))
        return {tap: head(features[tap], embedding) for tap, head in zip(self.config.taps, self.heads, strict=True)}
