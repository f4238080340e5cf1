"""The networks that an `Inputs` brings to a bundle, as functions to convert: batch 1, float32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.networks.codec import CodecConfig, build_codec
from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.pruned import PrunedDecoderConfig
from snapgen_jax.networks.tiny_decoder import TinyDecoderConfig
from snapgen_jax.training.exports import ExportUnit

Tree = Any


def text_unit(role: str, config: Any) -> ExportUnit:
    """The text encoder: tokens int32 and mask float32 `[1, L]` to sequence `[1, L, D]` and pooled `[1, P]`.

    Args:
        role: whose weights it has.
        config: of a text encoder with `max_tokens`.
    """
    network, _ = build(dataclasses.replace(config, dtype="float32"))

    def encode_text(weights: Tree, *, tokens: Any, mask: Any) -> dict[str, jax.Array]:
        context = apply(network, weights[role], tokens, mask)
        return {"sequence": context.sequence, "pooled": context.pooled}

    return ExportUnit("text_encoder", encode_text, (role,), _text_inputs(config))


def label_unit(role: str, config: Any) -> ExportUnit:
    """The embedding of class labels: label int32 `[1]` to sequence `[1, 1, D]`, mask `[1, 1]` and pooled `[1, D]`.

    Args:
        role: whose weights it has.
        config: its `LabelEmbeddingConfig`.
    """
    network, _ = build(dataclasses.replace(config, dtype="float32"))

    def embed_label(weights: Tree, *, label: Any) -> dict[str, jax.Array]:
        context = apply(network, weights[role], label)
        return {"sequence": context.sequence, "mask": context.mask, "pooled": context.pooled}

    return ExportUnit("label_embedding", embed_label, (role,), {"label": jax.ShapeDtypeStruct((1,), jnp.int32)})


def _text_inputs(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (1, config.max_tokens)
    return {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "mask": jax.ShapeDtypeStruct(shape, jnp.float32)}


def decoder_unit(config: CodecConfig, latent_shape: tuple[int, ...]) -> ExportUnit:
    """The decoder of a codec that is a network: latent `[1, h, w, c]` to image `[1, H, W, 3]` in [-1, 1].

    Its role is "codec", or "codec/decoder" where a tiny decoder takes the place of the autoencoder's own.

    Args:
        config: of the codec.
        latent_shape: `(h, w, c)`.
    """
    config = dataclasses.replace(
        config,
        autoencoder=dataclasses.replace(config.autoencoder, dtype="float32"),
        tiny_decoder=_for_export(config.tiny_decoder),
    )
    role = "codec/decoder" if config.decoder == "tiny" else "codec"
    latent = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
    part = _without_encoder if role == "codec" else None
    return ExportUnit("decoder", functools.partial(_decode, role, config), (role,), {"latent": latent}, part=part)


def _for_export(config: TinyDecoderConfig | PrunedDecoderConfig) -> TinyDecoderConfig | PrunedDecoderConfig:
    if isinstance(config, TinyDecoderConfig):
        return dataclasses.replace(config, dtype="float32", depthwise="grouped")
    return dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, dtype="float32"))


def _without_encoder(weights: Mapping[str, Tree]) -> dict[str, Tree]:
    return {role: {name: tree for name, tree in held.items() if name != "encoder"} for role, held in weights.items()}


def _decode(role: str, config: CodecConfig, weights: Mapping[str, Tree], *, latent: Any) -> dict[str, jax.Array]:
    codec = build_codec(config)
    held = {"decoder": weights[role]} if role == "codec/decoder" else {**codec.spec(), **weights[role]}
    return {"image": codec.bind(held).decode(latent)}
