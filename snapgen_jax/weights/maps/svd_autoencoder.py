"""The autoencoder of Stable Video Diffusion in diffusers' layout, `vae/`, -> `networks.video_autoencoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapgen_jax.networks.video_autoencoder import VideoAutoencoderConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, conv, conv3d, norm, one
from snapgen_jax.weights.maps import sd3_autoencoder
from snapgen_jax.weights.maps.svd_unet import temporal_residual
from snapgen_jax.weights.published import given


def read_config(values: Mapping[str, Any], **changes: Any) -> VideoAutoencoderConfig:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    Raises:
        ValueError: the checkpoint is of a kind that `VideoAutoencoder` does not have.
    """
    values = given(values)
    if (found := values.get("_class_name", "AutoencoderKLTemporalDecoder")) != "AutoencoderKLTemporalDecoder":
        raise ValueError(
            f"this autoencoder is {found!r}; VideoAutoencoder can only read an AutoencoderKLTemporalDecoder"
        )
    fields = {
        "channels": tuple(values["block_out_channels"]),
        "layers": values["layers_per_block"],
        "latent_channels": values.get("latent_channels", 4),
        "scale": values.get("scaling_factor", 0.18215),
    }
    return VideoAutoencoderConfig(**{**fields, **changes})


def weight_map(config: VideoAutoencoderConfig) -> WeightMap:
    """Every tensor of the checkpoint."""
    rules = [*sd3_autoencoder.coder(config.of_frames(), "encoder"), *conv("encoder/quantisation", "quant_conv")]
    rules += conv("decoder/conv_in", "decoder.conv_in")
    for i in range(config.layers):
        rules += _block(f"decoder/middle/block_{i:02d}", f"decoder.mid_block.resnets.{i}", skip=False)
    if config.layers > 1:
        rules += sd3_autoencoder.attention("decoder/attention", "decoder.mid_block.attentions.0")
    width = config.channels[-1]
    for i, channel in enumerate(config.channels[::-1]):
        for j in range(config.layers + 1):
            path = f"decoder/stages/block_{i:02d}/blocks/block_{j:02d}"
            rules += _block(path, f"decoder.up_blocks.{i}.resnets.{j}", skip=width != channel)
            width = channel
        if i < len(config.channels) - 1:
            rules += conv(f"decoder/stages/block_{i:02d}/sampler", f"decoder.up_blocks.{i}.upsamplers.0.conv")
    rules += norm("decoder/norm_out", "decoder.conv_norm_out")
    rules += conv("decoder/conv_out", "decoder.conv_out")
    rules += conv3d("decoder/conv_frames", "decoder.time_conv_out")
    unused = (
        () if config.layers > 1 else (r"decoder\.mid_block\.attentions\.0\..*",)
    )  # diffusers makes it, and leaves it out
    return WeightMap(tuple(rules), ignored=unused)


def _block(path: str, name: str, *, skip: bool) -> list[Rule]:
    return [
        *sd3_autoencoder.residual(f"{path}/spatial", f"{name}.spatial_res_block", skip=skip),
        *temporal_residual(f"{path}/temporal", f"{name}.temporal_res_block"),
        one(f"{path}/blend/factor", f"{name}.time_mixer.mix_factor"),
    ]
