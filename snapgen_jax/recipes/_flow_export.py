"""What leaves a run of flow matching for a phone: its networks as functions, and its sampler as plain data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.diffusion.path import T_MIN
from snapgen_jax.diffusion.timesteps import time_grid
from snapgen_jax.networks.codec import Codec, build_codec
from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import MAX_PERIOD, TIME_SCALE
from snapgen_jax.training.recipe import ExportPlan, ExportUnit

if TYPE_CHECKING:
    from snapgen_jax.recipes.flow_matching import FlowMatchingConfig

Tree = Any


def export_plan(config: FlowMatchingConfig, codec: Codec, null_caption: Mapping[str, np.ndarray]) -> ExportPlan:
    """All networks at the first image size, batch 1, in float32 with real depthwise convolutions.

    Args:
        config: of the run.
        codec: its codec, without parameters.
        null_caption: `tokens` and `mask` `[L]` of the empty caption.
    """
    latent_shape = codec.latent_shape(config.image_sizes[0])
    text, context = _text_unit(config)
    units = {
        "denoiser": _denoiser_unit(config, latent_shape, context),
        "text_encoder": text,
        **({"decoder": _decoder_unit(config, latent_shape)} if codec.spec() else {}),
    }
    names = {role: unit.name for role, unit in units.items()}
    scheduler = _scheduler(config, latent_shape, null_caption)
    return ExportPlan(list(units.values()), {**scheduler, "codec": codec.describe(), "units": names})


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _text_unit(config: FlowMatchingConfig) -> tuple[ExportUnit, TextContext]:
    """The text encoder, and the shapes of what it gives."""
    network, spec = build(dataclasses.replace(config.text, dtype="float32"))
    length = config.text.max_tokens
    inputs = {"tokens": jax.ShapeDtypeStruct((1, length), jnp.int32), "mask": _f32(1, length)}

    def encode_text(params: Tree, *, tokens: Any, mask: Any) -> dict[str, jax.Array]:
        context = apply(network, params, tokens, mask)
        return {"sequence": context.sequence, "pooled": context.pooled}

    def select(weights: Tree) -> Tree:
        return {**weights["frozen"], **weights["model"]}["text"]

    context = jax.eval_shape(functools.partial(apply, network), spec, *inputs.values())
    return ExportUnit("text_encoder", encode_text, select, inputs), context


def _denoiser_unit(config: FlowMatchingConfig, latent_shape: tuple[int, ...], context: TextContext) -> ExportUnit:
    name, settings = config.network, getattr(config, config.network)
    form = {"depthwise": "grouped"} if name == "unet" else {}
    network, _ = build(dataclasses.replace(settings, dtype="float32", **form))

    def denoise(params: Tree, *, latent: Any, time: Any, sequence: Any, mask: Any, pooled: Any) -> dict[str, jax.Array]:
        out, _ = apply(network, params, latent, time, TextContext(sequence, mask, pooled))
        return {"prediction": out}

    inputs = {
        "latent": _f32(1, *latent_shape),
        "time": _f32(1, settings.time_width),
        "sequence": _f32(*context.sequence.shape),
        "mask": _f32(1, config.text.max_tokens),
        "pooled": _f32(*context.pooled.shape),
    }
    return ExportUnit(name, denoise, lambda weights: weights["model"][name], inputs)


def _decoder_unit(config: FlowMatchingConfig, latent_shape: tuple[int, ...]) -> ExportUnit:
    settings = config.codec
    codec = build_codec(
        dataclasses.replace(
            settings,
            autoencoder=dataclasses.replace(settings.autoencoder, dtype="float32"),
            tiny_decoder=dataclasses.replace(settings.tiny_decoder, dtype="float32", depthwise="grouped"),
        )
    )

    def decode(params: Tree, *, latent: Any) -> dict[str, jax.Array]:
        return {"image": codec.bind(params).decode(latent)}

    def select(weights: Tree) -> Tree:
        params = weights["frozen"]["codec"]
        return {"decoder": params["decoder"]} if settings.decoder == "tiny" else params

    return ExportUnit("decoder", decode, select, {"latent": _f32(1, *latent_shape)})


def _scheduler(
    config: FlowMatchingConfig, latent_shape: tuple[int, ...], null_caption: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The sampler loop, which the client replays."""
    sampling = config.sampling
    return {
        "schema": 1,
        "kind": "flow_matching",
        "prediction": {"kind": "velocity"} if config.prediction == "velocity" else {"kind": "x_0", "t_min": T_MIN},
        "method": sampling.method,
        "times": [float(t) for t in time_grid(sampling.steps, sampling.shift)],
        "shift": sampling.shift,
        "guidance": sampling.guidance,
        "latent_shape": list(latent_shape),
        "image_shape": [*config.image_sizes[0], 3],
        "time_features": {
            "dim": getattr(config, config.network).time_width,
            "scale": TIME_SCALE,
            "max_period": MAX_PERIOD,
            "order": "cos,sin",
        },
        "text": {
            "length": config.text.max_tokens,
            "null_tokens": [int(i) for i in null_caption["tokens"]],
            "null_mask": [float(i) for i in null_caption["mask"]],
        },
    }
