"""The UNets of Stable Diffusion 1, 2 and XL in diffusers' layout, `unet/`, -> `networks.sd_unet.SDUNet`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, conv, linear, norm
from snapgen_jax.weights.published import given

_DOWN = {"CrossAttnDownBlock2D": "ra", "DownBlock2D": "r"}
_UP = {"CrossAttnUpBlock2D": "ra", "UpBlock2D": "r"}


def read_config(values: Mapping[str, Any], **changes: Any) -> SDUNetConfig:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    What is left out or null has diffusers' default. Its `attention_head_dim` is the number of heads.

    Raises:
        ValueError: the checkpoint is of a kind that `SDUNet` does not have.
    """
    values = given(values)
    channels = tuple(values.get("block_out_channels", (320, 640, 1280, 1280)))
    stages, pooled = len(channels), values.get("addition_embed_type") == "text_time"
    down = values.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up = values.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    unknown = [name for name, known in (*((d, _DOWN) for d in down), *((u, _UP) for u in up)) if name not in known]
    if unknown:
        raise ValueError(f"this UNet has the block {unknown[0]!r}; SDUNet has {', '.join([*_DOWN, *_UP])}")
    for key, default, expected in (
        ("mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn"),
        ("act_fn", "silu", "silu"),
        ("center_input_sample", False, False),
        ("flip_sin_to_cos", True, True),
        ("freq_shift", 0, 0),
        ("downsample_padding", 1, 1),
        ("mid_block_scale_factor", 1, 1),
        ("norm_eps", 1e-5, 1e-5),
        ("resnet_time_scale_shift", "default", "default"),
        ("only_cross_attention", False, False),
        ("dual_cross_attention", False, False),
        ("class_embed_type", None, None),
        ("time_embedding_type", "positional", "positional"),
        ("addition_embed_type", "text_time" if pooled else None, "text_time" if pooled else None),
        ("attention_type", "default", "default"),
        ("conv_in_kernel", 3, 3),
        ("conv_out_kernel", 3, 3),
    ):
        if (found := values.get(key, default)) != expected:
            raise ValueError(f"this UNet has {key} = {found!r}; SDUNet can only read {expected!r}")
    layers = _by_stage(values.get("layers_per_block", 2), stages)
    heads = values["num_attention_heads"] if "num_attention_heads" in values else values.get("attention_head_dim", 8)
    fields = {
        "latent_channels": values.get("in_channels", 4),
        "out_channels": values.get("out_channels", 4),
        "channels": channels,
        "down": tuple((_DOWN[kind],) * count for kind, count in zip(down, layers, strict=True)),
        "up": tuple((_UP[kind],) * (count + 1) for kind, count in zip(reversed(up), layers, strict=True)),
        "heads": _by_stage(heads, stages),
        "depth": _by_stage(values.get("transformer_layers_per_block", 1), stages),
        "context_width": values.get("cross_attention_dim", 1280),
        "pooled_width": values["projection_class_embeddings_input_dim"] if pooled else 0,
        "time_width": channels[0],
        "groups": values.get("norm_num_groups", 32),
        "projection": "linear" if values.get("use_linear_projection", False) else "conv",
    }
    return SDUNetConfig(**{**fields, **changes})


def _by_stage(value: Any, stages: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * stages


def weight_map(config: SDUNetConfig) -> WeightMap:
    """Every tensor of the checkpoint. Blocks are numbered in diffusers' order: of several residual blocks, or of
    several transformers, in one layer the layout knows nothing, so a config that has some is refused.

    Raises:
        ValueError: a layer has no published names.
    """
    last = len(config.channels) - 1
    rules = [*linear("time/inner", "time_embedding.linear_1"), *linear("time/outer", "time_embedding.linear_2")]
    if config.pooled_width:
        rules += [*linear("pooled/inner", "add_embedding.linear_1"), *linear("pooled/outer", "add_embedding.linear_2")]
    rules += conv("conv_in", "conv_in")
    width, skips = config.channels[0], [config.channels[0]]
    for stage, layers in enumerate(config.down):
        name = f"down_blocks.{stage}"
        for i, layer in enumerate(layers):
            path = f"down/block_{stage:02d}/block_{i:02d}"
            rules += _layer(config, path, name, i, layer, stage, skip=width != config.channels[stage])
            width = config.channels[stage]
            skips.append(width)
        if stage < last:
            rules += conv(f"downsamplers/block_{stage:02d}/conv", f"{name}.downsamplers.0.conv")
            skips.append(width)
    if config.mid != "rar":
        raise ValueError(f"the published layout has a middle 'rar', and this config {config.mid!r}")
    rules += _residual("mid/block_00", "mid_block.resnets.0", skip=False)
    rules += _transformer(config, "mid/block_01", "mid_block.attentions.0", config.depth[last])
    rules += _residual("mid/block_02", "mid_block.resnets.1", skip=False)
    for stage in reversed(range(last + 1)):
        name = f"up_blocks.{last - stage}"
        for i, layer in enumerate(config.up[stage]):
            path, joined = f"up/block_{stage:02d}/block_{i:02d}", width + skips.pop()
            rules += _layer(config, path, name, i, layer, stage, skip=joined != config.channels[stage])
            width = config.channels[stage]
        if stage:
            rules += conv(f"upsamplers/block_{stage - 1:02d}/conv", f"{name}.upsamplers.0.conv")
    rules += [*norm("norm_out", "conv_norm_out"), *conv("conv_out", "conv_out")]
    return WeightMap(tuple(rules))


def _layer(config: SDUNetConfig, path: str, name: str, i: int, layer: str, stage: int, *, skip: bool) -> list[Rule]:
    if layer not in ("r", "ra"):
        raise ValueError(f"the published layout has layers 'r' and 'ra', and this config {layer!r}")
    rules = _residual(f"{path}/block_00", f"{name}.resnets.{i}", skip=skip)
    if layer == "ra":
        rules += _transformer(config, f"{path}/block_01", f"{name}.attentions.{i}", config.depth[stage])
    return rules


def _residual(path: str, name: str, *, skip: bool) -> list[Rule]:
    rules = [*linear(f"{path}/embedding", f"{name}.time_emb_proj")]
    for i in (1, 2):
        rules += [*norm(f"{path}/norm_{i}", f"{name}.norm{i}"), *conv(f"{path}/conv_{i}", f"{name}.conv{i}")]
    return [*rules, *conv(f"{path}/skip", f"{name}.conv_shortcut")] if skip else rules


def _transformer(config: SDUNetConfig, path: str, name: str, depth: int) -> list[Rule]:
    project = conv if config.projection == "conv" else linear
    rules = [
        *norm(f"{path}/norm", f"{name}.norm"),
        *project(f"{path}/project_in", f"{name}.proj_in"),
        *project(f"{path}/project_out", f"{name}.proj_out"),
    ]
    for i in range(depth):
        rules += transformer_block(f"{path}/blocks/block_{i:02d}", f"{name}.transformer_blocks.{i}")
    return rules


def transformer_block(path: str, name: str) -> list[Rule]:
    """One `sd_blocks.TransformerBlock` of a `BasicTransformerBlock`."""
    rules: list[Rule] = []
    for part, i in (("self", 1), ("cross", 2)):
        rules += norm(f"{path}/{part}_norm", f"{name}.norm{i}")
        rules += [
            rule
            for ours, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"))
            for rule in linear(f"{path}/{part}_attention/{ours}", f"{name}.attn{i}.{theirs}", bias=False)
        ]
        rules += linear(f"{path}/{part}_attention/out", f"{name}.attn{i}.to_out.0")
    return [
        *rules,
        *norm(f"{path}/ffn_norm", f"{name}.norm3"),
        *linear(f"{path}/ffn/inner", f"{name}.ff.net.0.proj"),
        *linear(f"{path}/ffn/outer", f"{name}.ff.net.2"),
    ]
