"""Gemma 2 as transformers stores it: `google/gemma-2-2b`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.weights.mapping import Rule, WeightMap, at, linear, one, stacked
from snapgen_jax.weights.published import given


def read_config(values: Mapping[str, Any], **changes: Any) -> Gemma2Config:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    Raises:
        ValueError: the checkpoint is of a kind that `Gemma2` does not have.
    """
    values = given(values)
    layers = values["num_hidden_layers"]
    alternating = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    rope = given(values.get("rope_parameters") or values)  # older files: flat
    for key, found, expected in (
        ("model_type", values.get("model_type"), "gemma2"),
        ("hidden_activation", values.get("hidden_activation", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
        ("layer_types", values.get("layer_types", alternating), alternating),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("attention_bias", values.get("attention_bias", False), False),
        ("use_bidirectional_attention", values.get("use_bidirectional_attention", False), False),
    ):
        if found != expected:
            raise ValueError(f"this language model has {key} = {found!r}; Gemma2 can only read {expected!r}")
    fields = {
        "vocab_size": values["vocab_size"],
        "width": values["hidden_size"],
        "layers": layers,
        "heads": values["num_attention_heads"],
        "kv_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "ffn_width": values["intermediate_size"],
        "query_scale": values["query_pre_attn_scalar"],
        "softcap": values["attn_logit_softcapping"],
        "window": values["sliding_window"],
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "epsilon": values.get("rms_norm_eps", 1e-6),
    }
    return Gemma2Config(**{**fields, **changes})


def weight_map(config: Gemma2Config) -> WeightMap:
    """The tensors of a `Gemma2`. Files of the causal language model, with its head, are taken too."""

    def norm(path: str, name: str) -> Rule:
        return one(f"{path}/offset", f"{name}.weight")

    block = (
        norm("norm_1", "layers.{}.input_layernorm"),
        *linear("query", "layers.{}.self_attn.q_proj", bias=False),
        *linear("key", "layers.{}.self_attn.k_proj", bias=False),
        *linear("value", "layers.{}.self_attn.v_proj", bias=False),
        *linear("out", "layers.{}.self_attn.o_proj", bias=False),
        norm("norm_1_after", "layers.{}.post_attention_layernorm"),
        norm("norm_2", "layers.{}.pre_feedforward_layernorm"),
        *linear("gate", "layers.{}.mlp.gate_proj", bias=False),
        *linear("inner", "layers.{}.mlp.up_proj", bias=False),
        *linear("outer", "layers.{}.mlp.down_proj", bias=False),
        norm("norm_2_after", "layers.{}.post_feedforward_layernorm"),
    )
    return WeightMap(
        rules=(
            one("token_embedding", "embed_tokens.weight"),
            *stacked(at("blocks", block), range(config.layers)),
            norm("norm", "norm"),
        ),
        ignored=(r"lm_head\.weight",),
        prefixes=("", "model."),
    )
