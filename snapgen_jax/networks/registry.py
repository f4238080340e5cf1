"""The networks there are. A new one is added here, in one place, and nowhere else.

Config fields that hold a network are annotated with these unions; a value's `kind` says which config it is.
"""

from __future__ import annotations

import typing

from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.context import ConditionerConfig
from snapgen_jax.networks.detection import DetectionConfig
from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.lpips import LPIPSConfig
from snapgen_jax.networks.matching import MatchingConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Preset
from snapgen_jax.networks.patch_discriminator import PatchDiscriminatorConfig
from snapgen_jax.networks.projector import ProjectorConfig
from snapgen_jax.networks.pruned import PrunedDecoderConfig
from snapgen_jax.networks.rewards import RewardConfig
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.svd_unet import SVDUNetConfig
from snapgen_jax.networks.t5 import T5Config
from snapgen_jax.networks.tiny_decoder import TinyDecoderConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.networks.video_autoencoder import VideoAutoencoderConfig

DenoiserConfig = UNetConfig | MMDiTConfig | DiTConfig | SDUNetConfig
"""Of networks from a noisy latent, time features and a `TextContext` to a velocity and taps."""

TextEncoderConfig = ClipTextConfig | T5Config | Gemma2Config
"""Of networks from token ids and a mask to a `TextContext`."""

RewardNetworkConfig = RewardConfig | MatchingConfig | DetectionConfig
"""Of networks from images `[B, H, W, 3]` in [0, 1] and token ids `[B, L]` to a number each, `[B]`."""

CONFIGS: tuple[type[Preset], ...] = (
    *typing.get_args(DenoiserConfig),
    *typing.get_args(TextEncoderConfig),
    SVDUNetConfig,
    ConditionerConfig,
    LabelEmbeddingConfig,
    ClipVisionConfig,
    AutoencoderConfig,
    VideoAutoencoderConfig,
    TinyDecoderConfig,
    PrunedDecoderConfig,
    LPIPSConfig,
    RewardConfig,
    MatchingConfig,
    DetectionConfig,
    PatchDiscriminatorConfig,
    DiscriminatorConfig,
    ProjectorConfig,
)
"""Every network's config class, for what counts or lists them all."""
