"""Stable Diffusion's autoencoder in diffusers' layout, `vae/`, -> `networks.autoencoder.Autoencoder`.

Of Stable Diffusion 3, and of those before it, which have two quantisation convolutions more, and in whose files the
attention may have the names that diffusers gave it then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, conv, linear, norm
from snapgen_jax.weights.published import given


def read_config(values: Mapping[str, Any], **changes: Any) -> AutoencoderConfig:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    What is left out or null has diffusers' default: quantisation convolutions, a scale of 0.18215, and no shift.

    Raises:
        ValueError: the checkpoint is of a kind that `Autoencoder` does not have (without attention, say).
    """
    values = given(values)
    quantised = values.get("use_quant_conv", True)
    for key, default, expected in (
        ("use_post_quant_conv", True, quantised),
        ("mid_block_add_attention", True, True),
        ("act_fn", "silu", "silu"),
        ("in_channels", 3, 3),
        ("out_channels", 3, 3),
        ("latents_mean", None, None),
        ("latents_std", None, None),
    ):
        if (found := values.get(key, default)) != expected:
            raise ValueError(f"this autoencoder has {key} = {found!r}; Autoencoder can only read {expected!r}")
    fields = {
        "channels": tuple(values["block_out_channels"]),
        "layers": values["layers_per_block"],
        "latent_channels": values["latent_channels"],
        "groups": values["norm_num_groups"],
        "scale": values.get("scaling_factor", 0.18215),
        "shift": values.get("shift_factor", 0.0),
        "quantisation": "convolutions" if quantised else "none",
    }
    return AutoencoderConfig(**{**fields, **changes})


def write_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The `config.json` that diffusers reads of an autoencoder of constant normalisation: what `read_config` reads
    back. With a measured one, its users add `latents_mean` and `latents_std` and leave scale and shift out."""
    stages, quantised = len(config.channels), config.quantisation == "convolutions"
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "use_quant_conv": quantised,
        "use_post_quant_conv": quantised,
        "mid_block_add_attention": True,
        "force_upcast": False,
    }


def weight_map(config: AutoencoderConfig) -> WeightMap:
    """Every tensor of the checkpoint."""
    rules = (*coder(config, "encoder"), *coder(config, "decoder"))
    if config.quantisation == "convolutions":
        rules += (*conv("encoder/quantisation", "quant_conv"), *conv("decoder/quantisation", "post_quant_conv"))
    earlier = [
        (f"{coder}.mid_block.attentions.0.{before}.{part}", f"{coder}.mid_block.attentions.0.{now}.{part}")
        for coder in ("encoder", "decoder")
        for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
        for part in ("weight", "bias")
    ]
    return WeightMap(rules, aliases=tuple(earlier))


def coder(config: AutoencoderConfig, coder: Literal["encoder", "decoder"]) -> tuple[Rule, ...]:
    """One half, without its quantisation."""
    down = coder == "encoder"
    channels = config.channels if down else config.channels[::-1]
    blocks, sampler = ("down_blocks", "downsamplers") if down else ("up_blocks", "upsamplers")
    layers = config.layers if down else config.layers + 1

    rules, width = list(conv(f"{coder}/conv_in", f"{coder}.conv_in")), channels[0]
    for i, channel in enumerate(channels):
        path, name = f"{coder}/stages/block_{i:02d}", f"{coder}.{blocks}.{i}"
        for j in range(layers):
            rules += residual(f"{path}/residuals/block_{j:02d}", f"{name}.resnets.{j}", skip=width != channel)
            width = channel
        if i < len(channels) - 1:
            rules += conv(f"{path}/sampler", f"{name}.{sampler}.0.conv")
    rules += _middle(f"{coder}/middle", f"{coder}.mid_block")
    rules += norm(f"{coder}/norm_out", f"{coder}.conv_norm_out")
    rules += conv(f"{coder}/conv_out", f"{coder}.conv_out")
    return tuple(rules)


def residual(path: str, name: str, *, skip: bool = False) -> list[Rule]:
    """A residual block that is told no time."""
    rules: list[Rule] = []
    for i in (1, 2):
        rules += norm(f"{path}/norm_{i}", f"{name}.norm{i}")
        rules += conv(f"{path}/conv_{i}", f"{name}.conv{i}")
    return [*rules, *conv(f"{path}/skip", f"{name}.conv_shortcut")] if skip else rules


def _middle(path: str, name: str) -> list[Rule]:
    return [
        *residual(f"{path}/residual_1", f"{name}.resnets.0"),
        *attention(f"{path}/attention", f"{name}.attentions.0"),
        *residual(f"{path}/residual_2", f"{name}.resnets.1"),
    ]


def attention(path: str, name: str) -> list[Rule]:
    """A `networks.autoencoder.PixelAttention`."""
    return [
        *norm(f"{path}/norm", f"{name}.group_norm"),
        *linear(f"{path}/query", f"{name}.to_q"),
        *linear(f"{path}/key", f"{name}.to_k"),
        *linear(f"{path}/value", f"{name}.to_v"),
        *linear(f"{path}/out", f"{name}.to_out.0"),
    ]
