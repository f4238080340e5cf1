"""The UNets of Stable Diffusion 1, 2 and XL in diffusers' layout, `unet/`, -> `networks.sd_unet.SDUNet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.sd_unet_config import SDUNetArchitecture
from snapgen_jax.weights.mapping import Rule, WeightMap, conv, linear, norm
from snapgen_jax.weights.published import given


def read_config(values: Mapping[str, Any], **changes: Any) -> SDUNetConfig:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    What is left out or null has diffusers' default. Its `attention_head_dim` is the number of heads.

    Raises:
        ValueError: the checkpoint is of a kind that `SDUNet` does not have.
    """
    values = given(values)
    pooled = values.get("addition_embed_type") == "text_time"
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
    heads = values["num_attention_heads"] if "num_attention_heads" in values else values.get("attention_head_dim", 8)
    stages = read_stages(values, "2D", layers=2, heads=heads)
    fields = {
        **stages,
        "latent_channels": values.get("in_channels", 4),
        "out_channels": values.get("out_channels", 4),
        "context_width": values.get("cross_attention_dim", 1280),
        "pooled_width": values["projection_class_embeddings_input_dim"] if pooled else 0,
        "groups": values.get("norm_num_groups", 32),
        "projection": "linear" if values.get("use_linear_projection", False) else "conv",
    }
    return SDUNetConfig(**{**fields, **changes})


def read_stages(values: Mapping[str, Any], suffix: str, *, layers: int, heads: Any) -> dict[str, Any]:
    """What each stage is made of, from the values of a `config.json`; the names of the blocks end in `suffix`.

    Raises:
        ValueError: a block is of a kind that we do not have.
    """
    with_text, without = f"CrossAttn{{}}Block{suffix}", f"{{}}Block{suffix}"
    blocks = {
        (way, kind.format(way)): layer for way in ("Down", "Up") for kind, layer in ((with_text, "ra"), (without, "r"))
    }
    channels = tuple(values.get("block_out_channels", (320, 640, 1280, 1280)))
    down = values.get("down_block_types", (with_text.format("Down"),) * 3 + (without.format("Down"),))
    up = values.get("up_block_types", (without.format("Up"),) + (with_text.format("Up"),) * 3)
    for way, kinds in (("Down", down), ("Up", up)):
        if unknown := [kind for kind in kinds if (way, kind) not in blocks]:
            known = ", ".join(kind for _, kind in blocks)
            raise ValueError(f"this UNet has the block {unknown[0]!r}; ours has {known}")
    counts = _by_stage(values.get("layers_per_block", layers), len(channels))
    return {
        "channels": channels,
        "down": tuple((blocks["Down", kind],) * count for kind, count in zip(down, counts, strict=True)),
        "up": tuple((blocks["Up", kind],) * (count + 1) for kind, count in zip(reversed(up), counts, strict=True)),
        "heads": _by_stage(heads, len(channels)),
        "depth": _by_stage(values.get("transformer_layers_per_block", 1), len(channels)),
        "time_width": channels[0],
    }


def _by_stage(value: Any, stages: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * stages


def weight_map(config: SDUNetConfig) -> WeightMap:
    """Every tensor of the checkpoint.

    Raises:
        ValueError: the published layout has no names for the blocks of a layer.
    """

    def transformer(path: str, name: str, stage: int) -> list[Rule]:
        return _transformer(config, path, name, config.depth[stage])

    return WeightMap(tuple(walk(config, residual, transformer)))


def walk(
    config: SDUNetArchitecture,
    residual: Callable[[str, str, bool], list[Rule]],
    transformer: Callable[[str, str, int], list[Rule]],
) -> list[Rule]:
    """The rules of a UNet, block by block in diffusers' numbers.

    Args:
        config: its architecture.
        residual: (path, name, whether it has a skip convolution) -> rules.
        transformer: (path, name, stage) -> rules.

    Raises:
        ValueError: several residual blocks, or several transformers, are one layer; the layout has no names for them.
    """
    last = len(config.channels) - 1

    def layer(path: str, name: str, i: int, blocks: str, stage: int, skip: bool) -> list[Rule]:
        if blocks not in ("r", "ra"):
            raise ValueError(f"the published layout has layers 'r' and 'ra', and this config {blocks!r}")
        rules = residual(f"{path}/block_00", f"{name}.resnets.{i}", skip)
        return [*rules, *(transformer(f"{path}/block_01", f"{name}.attentions.{i}", stage) if "a" in blocks else [])]

    rules = [*linear("time/inner", "time_embedding.linear_1"), *linear("time/outer", "time_embedding.linear_2")]
    if config.pooled_width:
        rules += [*linear("pooled/inner", "add_embedding.linear_1"), *linear("pooled/outer", "add_embedding.linear_2")]
    rules += conv("conv_in", "conv_in")
    width, skips = config.channels[0], [config.channels[0]]
    for stage, layers in enumerate(config.down):
        name = f"down_blocks.{stage}"
        for i, blocks in enumerate(layers):
            path = f"down/block_{stage:02d}/block_{i:02d}"
            rules += layer(path, name, i, blocks, stage, width != config.channels[stage])
            width = config.channels[stage]
            skips.append(width)
        if stage < last:
            rules += conv(f"downsamplers/block_{stage:02d}/conv", f"{name}.downsamplers.0.conv")
            skips.append(width)
    if config.mid != "rar":
        raise ValueError(f"the published layout has a middle 'rar', and this config {config.mid!r}")
    rules += residual("mid/block_00", "mid_block.resnets.0", False)
    rules += transformer("mid/block_01", "mid_block.attentions.0", last)
    rules += residual("mid/block_02", "mid_block.resnets.1", False)
    for stage in reversed(range(last + 1)):
        name = f"up_blocks.{last - stage}"
        for i, blocks in enumerate(config.up[stage]):
            path, joined = f"up/block_{stage:02d}/block_{i:02d}", width + skips.pop()
            rules += layer(path, name, i, blocks, stage, joined != config.channels[stage])
            width = config.channels[stage]
        if stage:
            rules += conv(f"upsamplers/block_{stage - 1:02d}/conv", f"{name}.upsamplers.0.conv")
    return [*rules, *norm("norm_out", "conv_norm_out"), *conv("conv_out", "conv_out")]


def residual(path: str, name: str, skip: bool) -> list[Rule]:
    """A residual block that is told the time."""
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
        rules += attention(f"{path}/{part}_attention", f"{name}.attn{i}")
    return [
        *rules,
        *norm(f"{path}/ffn_norm", f"{name}.norm3"),
        *linear(f"{path}/ffn/inner", f"{name}.ff.net.0.proj"),
        *linear(f"{path}/ffn/outer", f"{name}.ff.net.2"),
    ]


def attention(path: str, name: str, *, bias: bool = False) -> list[Rule]:
    """Query, key and value with or without biases, and the output with one."""
    rules = [
        rule
        for ours, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"))
        for rule in linear(f"{path}/{ours}", f"{name}.{theirs}", bias=bias)
    ]
    return [*rules, *linear(f"{path}/out", f"{name}.to_out.0")]
