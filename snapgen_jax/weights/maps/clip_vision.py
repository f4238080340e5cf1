"""CLIP image encoders as transformers stores them (`openai/clip-vit-large-patch14`, `image_encoder` of Stable Video
Diffusion) and as OpenCLIP does (`open_clip_model.safetensors` of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.weights.mapping import WeightMap, linear, norm, one
from snapgen_jax.weights.maps.clip import Layout, layout_of, openclip_layer, transformers_layer
from snapgen_jax.weights.published import given

__all__ = ["Layout", "layout_of", "read_config", "weight_map"]


def read_config(values: Mapping[str, Any], **changes: Any) -> ClipVisionConfig:
    """The config of a checkpoint from the values of transformers' `config.json`; `changes` replaces our own fields.

    Raises:
        ValueError: the checkpoint is of a kind that `ClipVision` does not have.
    """
    values = given(values)
    whole = "vision_config" in values  # a whole CLIP holds the configs of both halves, and one projection
    projection = values.get("projection_dim", 512)
    values = given(values["vision_config"]) if whole else values
    width = values.get("hidden_size", 768)
    activation = values.get("hidden_act", "quick_gelu")
    for key, found, expected in (
        ("hidden_act", activation, activation if activation in ("quick_gelu", "gelu") else "'quick_gelu' or 'gelu'"),
        ("num_channels", values.get("num_channels", 3), 3),
        ("layer_norm_eps", values.get("layer_norm_eps", 1e-5), 1e-5),
    ):
        if found != expected:
            raise ValueError(f"this image encoder has {key} = {found!r}; ClipVision can only read {expected}")
    hidden = values.get("intermediate_size", 3072)
    fields = {
        "image_size": values.get("image_size", 224),
        "patch": values.get("patch_size", 32),
        "width": width,
        "layers": values.get("num_hidden_layers", 12),
        "heads": values.get("num_attention_heads", 12),
        "ffn_width": None if hidden == 4 * width else hidden,
        "projection": projection,
        "activation": activation,
        "key_bias": True,
    }
    return ClipVisionConfig(**{**fields, **changes})


def weight_map(config: ClipVisionConfig, layout: Layout = "transformers") -> WeightMap:
    """The tensors of a `ClipVision`. Files of a whole CLIP, with its text half, are taken too."""
    layers = range(config.layers)
    if layout == "openclip":
        return WeightMap(
            rules=(
                one("patch/kernel", "visual.conv1.weight", "conv"),
                one("class_embedding", "visual.class_embedding"),
                one("position_embedding", "visual.positional_embedding"),
                *norm("norm_in", "visual.ln_pre"),
                *(rule for i in layers for rule in openclip_layer(i, "visual.transformer.resblocks")),
                *norm("norm", "visual.ln_post"),
                one("projection/kernel", "visual.proj"),
            ),
            ignored=(
                r"transformer\..*",
                r"ln_final\..*",
                r"token_embedding\.weight",
                "positional_embedding",
                "text_projection",
                "logit_scale",
                "attn_mask",
            ),
        )
    embeddings = "vision_model.embeddings"
    return WeightMap(
        rules=(
            one("patch/kernel", f"{embeddings}.patch_embedding.weight", "conv"),
            one("class_embedding", f"{embeddings}.class_embedding"),
            one("position_embedding", f"{embeddings}.position_embedding.weight"),
            *norm("norm_in", "vision_model.pre_layrnorm"),
            *(
                rule
                for i in layers
                for rule in transformers_layer(i, "vision_model.encoder.layers", key_bias=config.key_bias)
            ),
            *norm("norm", "vision_model.post_layernorm"),
            *linear("projection", "visual_projection", bias=False),
        ),
        ignored=(
            r"text_model\..*",
            r"text_projection\.weight",
            "logit_scale",
            r"vision_model\.embeddings\.position_ids",  # 0, 1, 2 ..., written by old versions of transformers
        ),
    )
