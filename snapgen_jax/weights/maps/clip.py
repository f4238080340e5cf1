"""CLIP text encoders as transformers stores them: `text_encoder` and `text_encoder_2` of Stable Diffusion 3.5, and the
whole models they come from, `openai/clip-vit-large-patch14` and `laion/CLIP-ViT-bigG-14-laion2B-39B-b160k`.

OpenCLIP's own layout (`open_clip_model.safetensors` of the latter), which holds queries, keys and values in one tensor,
is read too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, fused, linear, norm, one
from snapgen_jax.weights.published import given

Tree = Any
Layout = Literal["transformers", "openclip"]


def read_config(values: Mapping[str, Any], **changes: Any) -> ClipTextConfig:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    Files that say `eos_token_id = 2` were written before the ids were corrected: there the last two tokens of the
    vocabulary begin and end a text, and the pooled state is that of the largest id. The padding is the tokenizer's
    matter; it is the end token here.

    Raises:
        ValueError: the checkpoint is of a kind that `ClipText` does not have.
    """
    values = given(values)
    if "text_config" in values:  # a whole CLIP holds the configs of both halves, and one projection
        projection = {"projection_dim": values["projection_dim"]} if "projection_dim" in values else {}
        values = given({**values["text_config"], **projection})
    vocab, width = values["vocab_size"], values["hidden_size"]
    activation = values.get("hidden_act", "quick_gelu")
    for key, found, expected in (
        ("hidden_act", activation, activation if activation in ("quick_gelu", "gelu") else "'quick_gelu' or 'gelu'"),
        ("intermediate_size", values["intermediate_size"], 4 * width),
        ("layer_norm_eps", values.get("layer_norm_eps", 1e-5), 1e-5),
    ):
        if found != expected:
            raise ValueError(f"this text encoder has {key} = {found!r}; ClipText can only read {expected}")
    early = values.get("eos_token_id", 49407) == 2
    eos_id = vocab - 1 if early else values.get("eos_token_id", 49407)
    fields = {
        "vocab_size": vocab,
        "width": width,
        "layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "max_tokens": values.get("max_position_embeddings", 77),
        "projection": values.get("projection_dim", 512),
        "activation": activation,
        "bos_id": vocab - 2 if early else values.get("bos_token_id", 49406),
        "eos_id": eos_id,
        "pad_id": eos_id,
        "pooling": "argmax" if early else "eos",
        "output": "penultimate",
        "key_bias": True,
    }
    return ClipTextConfig(**{**fields, **changes})


def write_config(config: ClipTextConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads of an encoder: what `read_config` reads back.

    To transformers `eos_token_id = 2` says that the pooled state is that of the largest id. An encoder that pools at an
    end token with the id 2 needs another id there (`move_end`).

    Raises:
        ValueError: transformers has no such encoder.
    """
    if config.attention != "causal" or config.neighbours:
        raise ValueError(
            f"its attention is {config.attention!r} with {config.neighbours} neighbours; that of transformers' CLIP is "
            "causal, with none"
        )
    if config.pooling == "eos" and config.eos_id == 2:
        raise ValueError("its end token has the id 2, which transformers takes for the largest id")
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "projection_dim": config.projection or config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_tokens,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": config.bos_id,
        "eos_token_id": 2 if config.pooling == "argmax" else config.eos_id,
        "pad_token_id": config.pad_id,
        "torch_dtype": "float32",
    }


def move_end(config: ClipTextConfig, params: Tree) -> tuple[ClipTextConfig, Tree]:
    """The same encoder, in which the end token has changed ids with the last one of the vocabulary."""
    table, last = np.array(params["token_embedding"]), config.vocab_size - 1
    table[[config.eos_id, last]] = table[[last, config.eos_id]]
    return dataclasses.replace(config, eos_id=last), {**params, "token_embedding": table}


def weight_map(config: ClipTextConfig, layout: Layout = "transformers") -> WeightMap:
    """The tensors of a `ClipText`. Files of a whole CLIP, with its image half, are taken too."""
    layers = range(config.layers)
    if layout == "openclip":
        return WeightMap(
            rules=(
                one("token_embedding", "token_embedding.weight"),
                one("position_embedding", "positional_embedding"),
                *(rule for i in layers for rule in openclip_layer(i, "transformer.resblocks")),
                *norm("norm", "ln_final"),
                *((one("projection/kernel", "text_projection"),) if config.projection else ()),
            ),
            ignored=(r"visual\..*", "logit_scale", "attn_mask"),
        )
    return WeightMap(
        rules=(
            one("token_embedding", "text_model.embeddings.token_embedding.weight"),
            one("position_embedding", "text_model.embeddings.position_embedding.weight"),
            *(
                rule
                for i in layers
                for rule in transformers_layer(i, "text_model.encoder.layers", key_bias=config.key_bias)
            ),
            *norm("norm", "text_model.final_layer_norm"),
            *(linear("projection", "text_projection", bias=False) if config.projection else ()),
        ),
        ignored=(
            r"vision_model\..*",
            r"visual_projection\.weight",
            r"logit_scale",
            r"text_model\.embeddings\.position_ids",  # 0, 1, 2 ..., written by old versions of transformers
        ),
    )


def read_map(config: ClipTextConfig) -> WeightMap:
    """As `weight_map`, of files of an encoder alone as newer versions of transformers write them, too."""
    whole, prefix = weight_map(config), "text_model."
    if config.projection:
        return whole
    bare = (dataclasses.replace(r, names=tuple(name.removeprefix(prefix) for name in r.names)) for r in whole.rules)
    ignored = tuple(pattern.removeprefix(r"text_model\.") for pattern in whole.ignored)
    return dataclasses.replace(whole, rules=tuple(bare), ignored=ignored, prefixes=(prefix, ""))


def layout_of(names: Iterable[str]) -> Layout:
    """The layout that the tensors of these names are in, those of either half of a CLIP."""
    openclip = any(re.search(r"(^|\.)resblocks\.", name) for name in names)
    return "openclip" if openclip else "transformers"


def transformers_layer(layer: int, layers: str, *, key_bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a `ClipLayer` from one of the layers that transformers calls `layers`."""
    path, name = f"layers/block_{layer:02d}", f"{layers}.{layer}"
    return (
        *norm(f"{path}/norm_1", f"{name}.layer_norm1"),
        *linear(f"{path}/attention/query", f"{name}.self_attn.q_proj"),
        *linear(f"{path}/attention/key", f"{name}.self_attn.k_proj", bias=key_bias),
        *linear(f"{path}/attention/value", f"{name}.self_attn.v_proj"),
        *linear(f"{path}/attention/out", f"{name}.self_attn.out_proj"),
        *norm(f"{path}/norm_2", f"{name}.layer_norm2"),
        *linear(f"{path}/inner", f"{name}.mlp.fc1"),
        *linear(f"{path}/outer", f"{name}.mlp.fc2"),
    )


def openclip_layer(layer: int, layers: str) -> tuple[Rule, ...]:
    """The rules of a `ClipLayer` from one of the layers that OpenCLIP calls `layers`."""
    path, name = f"layers/block_{layer:02d}", f"{layers}.{layer}"
    heads = [f"{path}/attention/{part}" for part in ("query", "key", "value")]
    return (
        *norm(f"{path}/norm_1", f"{name}.ln_1"),
        *fused([f"{part}/kernel" for part in heads], f"{name}.attn.in_proj_weight", "linear"),
        *fused([f"{part}/bias" for part in heads], f"{name}.attn.in_proj_bias"),
        *linear(f"{path}/attention/out", f"{name}.attn.out_proj"),
        *norm(f"{path}/norm_2", f"{name}.ln_2"),
        *linear(f"{path}/inner", f"{name}.mlp.c_fc"),
        *linear(f"{path}/outer", f"{name}.mlp.c_proj"),
    )
