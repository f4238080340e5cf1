"""Gemma 2 as transformers stores it: `google/gemma-2-2b`."""

from __future__ import annotations

from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.weights.mapping import Rule, WeightMap, at, linear, one, stacked


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
