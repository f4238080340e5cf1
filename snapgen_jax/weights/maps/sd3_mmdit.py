"""Stable Diffusion 3.5 (Large, Large Turbo, Medium) in diffusers' layout, `transformer/`, -> `networks.mmdit.MMDiT`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, at, conv, linear, norm, one, stacked
from snapgen_jax.weights.published import given

_BLOCK = "transformer_blocks.{}"


def read_config(values: Mapping[str, Any], **changes: Any) -> MMDiTConfig:
    """The config of a checkpoint from the values of its `config.json`; `changes` replaces our own fields.

    Raises:
        ValueError: the checkpoint is of a kind that `MMDiT` does not have (Stable Diffusion 3 before 3.5, say).
    """
    values = given(values)
    dual = tuple(values.get("dual_attention_layers", ()))
    width = values["num_attention_heads"] * values["attention_head_dim"]
    for key, found, expected in (
        ("qk_norm", values.get("qk_norm"), "rms_norm"),
        ("dual_attention_layers", dual, tuple(range(len(dual)))),
        ("caption_projection_dim", values["caption_projection_dim"], width),
        ("out_channels", values.get("out_channels") or values["in_channels"], values["in_channels"]),
    ):
        if found != expected:
            raise ValueError(f"this transformer has {key} = {found!r}; MMDiT can only read {expected!r}")
    fields = {
        "latent_channels": values["in_channels"],
        "patch": values["patch_size"],
        "depth": values["num_layers"],
        "dual": len(dual),
        "heads": values["num_attention_heads"],
        "head_dim": values["attention_head_dim"],
        "context_width": values["joint_attention_dim"],
        "pooled_width": values["pooled_projection_dim"],
        "position_size": values["pos_embed_max_size"],
        "position_base": values["sample_size"] // values["patch_size"],
    }
    return MMDiTConfig(**{**fields, **changes})


def weight_map(config: MMDiTConfig) -> WeightMap:
    """Every tensor of the checkpoint, the stored position table included."""
    last = config.depth - 1
    return WeightMap(
        (
            one("position", "pos_embed.pos_embed"),
            *conv("patch", "pos_embed.proj"),
            *_embedding("time", "time_text_embed.timestep_embedder"),
            *_embedding("pooled", "time_text_embed.text_embedder"),
            *linear("context", "context_embedder"),
            *_stack("dual_blocks", _dual(), range(config.dual)),
            *_stack("joint_blocks", _joint(), range(config.dual, last)),
            *at("last_block", (_name(rule, last) for rule in _last())),
            *linear("modulation_out", "norm_out.linear"),
            *linear("out", "proj_out"),
        )
    )


def _embedding(path: str, name: str) -> tuple[Rule, ...]:
    return *linear(f"{path}/inner", f"{name}.linear_1"), *linear(f"{path}/outer", f"{name}.linear_2")


def _stack(path: str, rules: Iterable[Rule], blocks: range) -> tuple[Rule, ...]:
    return at(path, stacked(rules, blocks)) if blocks else ()


def _name(rule: Rule, block: int) -> Rule:
    return dataclasses.replace(rule, names=(rule.names[0].format(block),))


def _last() -> tuple[Rule, ...]:
    """The last block: its text stream has neither a way back nor a feed-forward network."""
    return (
        *linear("image/modulation", f"{_BLOCK}.norm1.linear"),
        *_attention("image/attention", f"{_BLOCK}.attn", "to_{}", "norm_{}"),
        *linear("image/attention/back", f"{_BLOCK}.attn.to_out.0"),
        *_feed_forward("image/feed_forward", f"{_BLOCK}.ff"),
        *linear("text/modulation", f"{_BLOCK}.norm1_context.linear"),
        *_attention("text/attention", f"{_BLOCK}.attn", "add_{}_proj", "norm_added_{}"),
    )


def _joint() -> tuple[Rule, ...]:
    return (
        *_last(),
        *linear("text/attention/back", f"{_BLOCK}.attn.to_add_out"),
        *_feed_forward("text/feed_forward", f"{_BLOCK}.ff_context"),
    )


def _dual() -> tuple[Rule, ...]:
    return (
        *_joint(),
        *_attention("image/self_attention", f"{_BLOCK}.attn2", "to_{}", "norm_{}"),
        *linear("image/self_attention/back", f"{_BLOCK}.attn2.to_out.0"),
    )


def _attention(path: str, name: str, projection: str, gain: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{path}/query", f"{name}.{projection.format('q')}"),
        *linear(f"{path}/key", f"{name}.{projection.format('k')}"),
        *linear(f"{path}/value", f"{name}.{projection.format('v')}"),
        *norm(f"{path}/query_norm", f"{name}.{gain.format('q')}", bias=False),
        *norm(f"{path}/key_norm", f"{name}.{gain.format('k')}", bias=False),
    )


def _feed_forward(path: str, name: str) -> tuple[Rule, ...]:
    return *linear(f"{path}/inner", f"{name}.net.0.proj"), *linear(f"{path}/outer", f"{name}.net.2")
