"""The autoencoder of Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127): the encoder of Stable Diffusion
1, frame by frame, and a decoder that sees the frames of a clip together, so that they do not flicker."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.autoencoder import (
    COLOURS,
    EPSILON,
    AutoencoderConfig,
    Encoder,
    PixelAttention,
    ResidualBlock,
)
from snapgen_jax.networks.layers import Conv, GroupNorm, upsample_nearest
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, shard
from snapgen_jax.networks.svd_blocks import Blend, TemporalConv, TemporalResidualBlock

__all__ = ["VideoAutoencoder", "VideoAutoencoderConfig"]

_TEMPORAL_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class VideoAutoencoderConfig(Preset):
    """Architecture of a `VideoAutoencoder`. The defaults are the published ones.

    Attributes:
        channels: width of each stage, from the highest resolution to the lowest. Each stage but the last halves it.
        layers: residual blocks of a stage of the encoder; the decoder has one more.
        latent_channels: channels of a latent.
        groups: groups of every GroupNorm.
        scale: latents are the encoder's mean times this.
        attention_chunk: queries at a time in the attention at the lowest resolution.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["video_autoencoder"] = "video_autoencoder"
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215
    attention_chunk: int = 2048
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "svd": {},
        "smoke": {"channels": (8, 16), "layers": 1, "groups": 4},
    }

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"VideoAutoencoderConfig: layers={self.layers}; a stage has at least one")
        self.of_frames()

    def of_frames(self) -> AutoencoderConfig:
        """The autoencoder of single frames, whose encoder and spatial blocks this one has."""
        return AutoencoderConfig(
            channels=self.channels,
            layers=self.layers,
            latent_channels=self.latent_channels,
            groups=self.groups,
            scale=self.scale,
            shift=0.0,
            quantisation="convolutions",
            attention_chunk=self.attention_chunk,
            dtype=self.dtype,
        )

    @property
    def reduction(self) -> int:
        """Side, in pixels, of the square that becomes one latent pixel."""
        return self.of_frames().reduction

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the autoencoder with freshly drawn parameters."""
        return VideoAutoencoder(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return self.of_frames().rules()

    def input_spec(
        self, batch: int = 1, height: int = 256, width: int = 256, frames: int = 4
    ) -> tuple[jax.ShapeDtypeStruct]:
        """Shape of the positional argument of a `VideoAutoencoder`: clips."""
        return (jax.ShapeDtypeStruct((batch, frames, height, width, COLOURS), jnp.float32),)


class SpaceTimeBlock(nnx.Module):
    """A residual block on each frame, and one over the frames of its result."""

    def __init__(self, config: VideoAutoencoderConfig, in_width: int, out_width: int, rngs: nnx.Rngs):
        self.spatial = ResidualBlock(config.of_frames(), in_width, out_width, rngs)
        self.temporal = TemporalResidualBlock(
            out_width, None, groups=config.groups, epsilon=_TEMPORAL_EPSILON, dtype=compute_dtype(config), rngs=rngs
        )
        self.blend = Blend(initial=0.0)

    def __call__(self, x: jax.Array, frames: int) -> jax.Array:
        """`[B * F, H, W, in] -> [B * F, H, W, out]`."""
        x = self.spatial(x)
        return shard(self.blend(self.temporal(x, frames), x), "image")


class TemporalStage(nnx.Module):
    """Blocks of one resolution, then a doubling of it, but for the last."""

    def __init__(self, config: VideoAutoencoderConfig, in_width: int, out_width: int, doubles: bool, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            [SpaceTimeBlock(config, out_width if i else in_width, out_width, rngs) for i in range(config.layers + 1)]
        )
        self.sampler = Conv(out_width, out_width, dtype=compute_dtype(config), rngs=rngs) if doubles else None


class TemporalDecoder(nnx.Module):
    """Latents of clips, before normalisation, to frames."""

    def __init__(self, config: VideoAutoencoderConfig, rngs: nnx.Rngs):
        dtype, channels = compute_dtype(config), config.channels[::-1]
        width = channels[0]
        self.conv_in = Conv(config.latent_channels, width, dtype=dtype, rngs=rngs)
        self.middle = nnx.List([SpaceTimeBlock(config, width, width, rngs) for _ in range(config.layers)])
        self.attention = PixelAttention(config.of_frames(), width, rngs) if config.layers > 1 else None
        self.stages = nnx.List()
        for i, channel in enumerate(channels):
            self.stages.append(TemporalStage(config, width, channel, i < len(channels) - 1, rngs))
            width = channel
        self.norm_out = GroupNorm(width, config.groups, epsilon=EPSILON, dtype=dtype)
        self.conv_out = Conv(width, COLOURS, dtype=dtype, rngs=rngs)
        self.conv_frames = TemporalConv(COLOURS, COLOURS, dtype=dtype, rngs=rngs)

    def __call__(self, z: jax.Array, frames: int) -> jax.Array:
        """`[B * F, h, w, c]` -> `[B * F, H, W, 3]` float32."""
        x = self.conv_in(shard(z, "image"))
        for i, block in enumerate(self.middle):
            if i == 1 and self.attention is not None:
                x = self.attention(x)
            x = block(x, frames)
        for stage in self.stages:
            for block in stage.blocks:
                x = block(x, frames)
            if stage.sampler is not None:
                x = shard(stage.sampler(upsample_nearest(x)), "image")
        x = self.conv_out(jax.nn.silu(self.norm_out(x)))
        return self.conv_frames(x, frames).astype(jnp.float32)


class VideoAutoencoder(nnx.Module):
    """Build it through `networks.module.build`."""

    def __init__(self, config: VideoAutoencoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config.of_frames(), rngs)
        self.decoder = TemporalDecoder(config, rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Latents `[..., h, w, c]`, the means, of images `[..., H, W, 3]` in [-1, 1]."""
        mean, _ = self.encoder(images.reshape(-1, *images.shape[-3:]))
        return self.config.scale * mean.reshape(*images.shape[:-3], *mean.shape[1:])

    def decode(self, latents: jax.Array) -> jax.Array:
        """Frames `[B, F, H, W, 3]` of latents `[B, F, h, w, c]`, which the decoder sees together."""
        clips, frames = latents.shape[:2]
        z = latents.reshape(clips * frames, *latents.shape[2:]) / self.config.scale
        images = self.decoder(z, frames)
        return images.reshape(clips, frames, *images.shape[1:])

    def __call__(self, clips: jax.Array) -> jax.Array:
        """The reconstruction of clips `[B, F, H, W, 3]`."""
        return self.decode(self.encode(clips))
