"""CLIP text encoders as transformers stores them: `text_encoder` and `text_encoder_2` of Stable Diffusion 3.5, and the
whole models they come from, `openai/clip-vit-large-patch14` and `laion/CLIP-ViT-bigG-14-laion2B-39B-b160k`."""

from __future__ import annotations

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, linear, norm, one


def weight_map(config: ClipTextConfig) -> WeightMap:
    """The tensors of a `ClipText`. Files of a whole CLIP, with its image half, are taken too."""
    return WeightMap(
        rules=(
            one("token_embedding", "text_model.embeddings.token_embedding.weight"),
            one("position_embedding", "text_model.embeddings.position_embedding.weight"),
            *(rule for layer in range(config.layers) for rule in _layer(layer, key_bias=config.key_bias)),
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


def _layer(layer: int, *, key_bias: bool) -> tuple[Rule, ...]:
    path, name = f"layers/block_{layer:02d}", f"text_model.encoder.layers.{layer}"
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
