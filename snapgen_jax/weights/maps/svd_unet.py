"""The UNet of Stable Video Diffusion in diffusers' layout, `unet/`, -> `networks.svd_unet.SVDUNet`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapgen_jax.networks.svd_unet import SVDUNetConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, conv3d, linear, norm, one
from snapgen_jax.weights.maps import sd_unet
from snapgen_jax.weights.published import given

FRAME_RATE_WIDTH = 256  # features of each of the three numbers that a clip is told


def read_config(values: Mapping[str, Any], **changes: Any) -> SVDUNetConfig:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    Raises:
        ValueError: the checkpoint is of a kind that `SVDUNet` does not have.
    """
    values = given(values)
    fields = {
        **sd_unet.read_stages(
            values, "SpatioTemporal", layers=2, heads=values.get("num_attention_heads", (5, 10, 20, 20))
        ),
        "latent_channels": values.get("in_channels", 8),
        "out_channels": values.get("out_channels", 4),
        "context_width": values.get("cross_attention_dim", 1024),
        "pooled_width": values.get("projection_class_embeddings_input_dim", 3 * FRAME_RATE_WIDTH),
    }
    return SVDUNetConfig(**{**fields, **changes})


def weight_map(config: SVDUNetConfig) -> WeightMap:
    """Every tensor of the checkpoint.

    Raises:
        ValueError: the published layout has no names for the blocks of a layer.
    """

    def residual(path: str, name: str, skip: bool) -> list[Rule]:
        return [
            *sd_unet.residual(f"{path}/spatial", f"{name}.spatial_res_block", skip),
            *temporal_residual(f"{path}/temporal", f"{name}.temporal_res_block"),
            *linear(f"{path}/temporal/embedding", f"{name}.temporal_res_block.time_emb_proj"),
            one(f"{path}/blend/factor", f"{name}.time_mixer.mix_factor"),
        ]

    def transformer(path: str, name: str, stage: int) -> list[Rule]:
        rules = [
            *norm(f"{path}/norm", f"{name}.norm"),
            *linear(f"{path}/project_in", f"{name}.proj_in"),
            *linear(f"{path}/project_out", f"{name}.proj_out"),
            *linear(f"{path}/frame_position/inner", f"{name}.time_pos_embed.linear_1"),
            *linear(f"{path}/frame_position/outer", f"{name}.time_pos_embed.linear_2"),
            one(f"{path}/blend/factor", f"{name}.time_mixer.mix_factor"),
        ]
        for i in range(config.depth[stage]):
            ours, theirs = f"{path}/temporal_blocks/block_{i:02d}", f"{name}.temporal_transformer_blocks.{i}"
            rules += sd_unet.transformer_block(f"{path}/blocks/block_{i:02d}", f"{name}.transformer_blocks.{i}")
            rules += sd_unet.transformer_block(ours, theirs)
            rules += norm(f"{ours}/norm_in", f"{theirs}.norm_in")
            rules += linear(f"{ours}/ffn_in/inner", f"{theirs}.ff_in.net.0.proj")
            rules += linear(f"{ours}/ffn_in/outer", f"{theirs}.ff_in.net.2")
        return rules

    return WeightMap(tuple(sd_unet.walk(config, residual, transformer)))


def temporal_residual(path: str, name: str) -> list[Rule]:
    """A `svd_blocks.TemporalResidualBlock` without the projection of the time."""
    return [
        rule
        for i in (1, 2)
        for rule in (
            *norm(f"{path}/norm_{i}", f"{name}.norm{i}"),
            *conv3d(f"{path}/conv_{i}", f"{name}.conv{i}"),
        )
    ]
