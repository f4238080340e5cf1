"""T5 encoders as transformers stores them: `google/t5-v1_1-*`, and `text_encoder_3` of Stable Diffusion 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapgen_jax.networks.t5 import T5Config
from snapgen_jax.weights.mapping import WeightMap, at, linear, norm, one, stacked
from snapgen_jax.weights.published import given


def read_config(values: Mapping[str, Any], **changes: Any) -> T5Config:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    Raises:
        ValueError: the checkpoint is of a kind that `T5Encoder` does not have (the first T5, which is not gated, say).
    """
    values = given(values)
    kind = values.get("feed_forward_proj", "relu")
    if kind != "gated-gelu":
        raise ValueError(f"this T5 has feed_forward_proj = {kind!r}; T5Encoder can only read 'gated-gelu' (T5 v1.1)")
    fields = {
        "vocab_size": values["vocab_size"],
        "width": values["d_model"],
        "layers": values["num_layers"],
        "heads": values["num_heads"],
        "head_dim": values["d_kv"],
        "ffn_width": values["d_ff"],
        "buckets": values.get("relative_attention_num_buckets", 32),
        "max_distance": values.get("relative_attention_max_distance", 128),
        "epsilon": values.get("layer_norm_epsilon", 1e-6),
    }
    return T5Config(**{**fields, **changes})


def weight_map(config: T5Config) -> WeightMap:
    """The tensors of a `T5Encoder`. Files of the whole model, with its decoder, are taken too."""
    attention, ffn = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    block = (
        *norm("norm_1", f"{attention}.layer_norm", bias=False),
        *linear("query", f"{attention}.SelfAttention.q", bias=False),
        *linear("key", f"{attention}.SelfAttention.k", bias=False),
        *linear("value", f"{attention}.SelfAttention.v", bias=False),
        *linear("out", f"{attention}.SelfAttention.o", bias=False),
        *norm("norm_2", f"{ffn}.layer_norm", bias=False),
        *linear("gate", f"{ffn}.DenseReluDense.wi_0", bias=False),
        *linear("inner", f"{ffn}.DenseReluDense.wi_1", bias=False),
        *linear("outer", f"{ffn}.DenseReluDense.wo", bias=False),
    )
    return WeightMap(
        rules=(
            one("token_embedding", "shared.weight"),
            one("distance_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            *stacked(at("blocks", block), range(config.layers)),
            *norm("norm", "encoder.final_layer_norm", bias=False),
        ),
        aliases=(("encoder.embed_tokens.weight", "shared.weight"),),
        ignored=(r"decoder\..*", r"lm_head\.weight"),
    )
