"""T5 encoders as transformers stores them: `google/t5-v1_1-*`, and `text_encoder_3` of Stable Diffusion 3.5."""

from __future__ import annotations

from snapgen_jax.networks.t5 import T5Config
from snapgen_jax.weights.mapping import WeightMap, at, linear, norm, one, stacked


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
