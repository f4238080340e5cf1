"""What leaves a run of flow matching for a phone: its denoiser as a function, and its sampler as plain data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.diffusion.guidance import ALL_TIMES
from snapgen_jax.diffusion.path import T_MIN
from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_cache import TimeCachedConfig, with_table
from snapgen_jax.networks.time_features import MAX_PERIOD, TIME_SCALE, time_features
from snapgen_jax.recipes._sampling import SamplingConfig, sampling_grid
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs, InputsExport

Tree = Any
Time = Literal["features", "table"]
PHONE = {"depthwise": "grouped", "attention": "whole"}  # the forms of an exported file


def flow_plan(
    *,
    denoiser_role: str,
    denoiser: Denoiser,
    sampling: SamplingConfig,
    latent_shape: tuple[int, ...],
    image_shape: tuple[int, ...],
    context: TextContext,
    inputs: InputsExport,
    golden: GoldenInputs,
    time: Time = "features",
) -> ExportPlan:
    """The denoiser at batch 1, in float32 with real depthwise convolutions, and the sampler that calls all units.

    Args:
        denoiser_role: whose weights the denoiser has: "unet".
        denoiser: the network and what its output stands for.
        sampling: the sampler's settings.
        latent_shape, image_shape: of one example.
        context: ShapeDtypeStructs `[1, ...]` of what the denoiser attends to.
        inputs: the units around it, and the inputs of the empty condition.
        golden: what the golden examples begin with.
        time: what the denoiser is told: features of any time, or which time of the sampler's grid. With a "table" of
            that grid the layers of time leave the file, and there is no other number of steps.

    Raises:
        ConfigError: the denoiser's schedule is not that of a flow.
    """
    if denoiser.schedule.kind != "flow":
        raise ConfigError(
            f"a bundle's sampler follows a flow, and this network has the schedule {denoiser.schedule.kind!r}; distil "
            "it into one whose schedule.kind is 'flow', and export that"
        )
    network_config, prediction = denoiser.network.config, denoiser.prediction
    if prediction not in ("velocity", "x_0"):
        raise ConfigError(
            f"a bundle knows the predictions 'velocity' and 'x_0', and this network predicts {prediction!r}"
        )
    codec, decoder, text = inputs.codec, inputs.decoder, [unit.name for unit in inputs.encoders]
    grid = sampling_grid(denoiser.schedule, sampling)
    features = None
    if time == "table":
        asked = grid.time if sampling.method == "heun" else grid.time[:-1]
        scale = denoiser.schedule.time_scale
        features = np.asarray(time_features(jnp.asarray(asked), network_config.time_width, scale))
    unit = denoiser_unit(denoiser_role, network_config, latent_shape, context, features)
    whole = sampling.guidance_interval == ALL_TIMES
    if codec is None:
        outputs = {"latent": {"shape": list(latent_shape), "dtype": "float32"}}
    else:
        outputs = {"image": {"shape": list(image_shape), "dtype": "uint8"}}
    program = {
        "schema": 3,
        "kind": "flow",
        "inputs": {
            name: _array(array) if inputs.null_context else {**_array(array), "null": array.tolist()}
            for name, array in inputs.null.items()
        },
        "outputs": outputs,
        "latent_shape": list(latent_shape),
        "times": [float(t) for t in grid.t],
        # With a shift a client may choose the number of steps.
        **({} if sampling.times or features is not None else {"shift": sampling.shift}),
        "step": {
            "unit": unit.name,
            "rule": sampling.method,
            "time": {
                "kind": "features",
                "dim": network_config.time_width,
                "scale": TIME_SCALE,
                "max_period": MAX_PERIOD,
                "order": "cos,sin",
            }
            if features is None
            else {"kind": "index", "size": len(features)},
            "prediction": {"kind": "velocity"} if prediction == "velocity" else {"kind": "x_0", "t_min": T_MIN},
            "guidance": sampling.guidance,
            **({} if whole else {"guidance_interval": list(sampling.guidance_interval)}),
            **({"context": "text"} if text else {}),
        },
        "decoder": None if codec is None else {**codec, **({"unit": decoder.name} if decoder else {})},
        **({"tokenizers": [dict(entry) for entry in inputs.tokenizers]} if inputs.tokenizers else {}),
        **({"contexts": {"text": text}} if text else {}),
    }
    if inputs.null_context:
        nulls = {name: {**_array(array), "null": array.item(0)} for name, array in inputs.null_context.items()}
        program["null_contexts"] = {"text": nulls}
    return ExportPlan([unit, *inputs.encoders, *([decoder] if decoder else [])], program, golden)


def _array(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def denoiser_unit(
    role: str,
    config: Any,
    latent_shape: tuple[int, ...],
    context: TextContext,
    features: np.ndarray | None = None,
) -> ExportUnit:
    """A denoiser: latent, time and context to prediction, in the shape of the latent.

    Its function also takes intermediates of the network by their names, in place of its own, and returns those that
    `keeps` names.

    Args:
        role: whose weights it has.
        config: of the network.
        latent_shape: `(h, w, c)`.
        context: ShapeDtypeStructs `[1, ...]` of what it attends to.
        features: None, and its time is features `[1, T]`; or the features `[S, T]` of a grid, and its time is a row
            `[1, S]` of zeros with a one, see `networks/time_cache.py`.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    form = {name: value for name, value in PHONE.items() if name in fields}
    config = dataclasses.replace(config, dtype="float32", **form)
    cached = config if features is None else TimeCachedConfig.of(config, len(features))
    shapes = {
        "latent": (1, *latent_shape),
        "time": (1, cached.time_width),
        "sequence": context.sequence.shape,
        "mask": context.mask.shape,
        "pooled": context.pooled.shape,
    }
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    part = None if features is None else functools.partial(_with_table, role, config, features)
    return ExportUnit(role.replace("/", "_"), functools.partial(_denoise, role, cached), (role,), inputs, part=part)


def _with_table(role: str, config: Any, features: np.ndarray, weights: Mapping[str, Tree]) -> dict[str, Tree]:
    return {**weights, role: with_table(config, weights[role], jnp.asarray(features))}


def _denoise(
    role: str,
    config: Any,
    weights: Tree,
    *,
    latent: Any,
    time: Any,
    sequence: Any,
    mask: Any,
    pooled: Any,
    keeps: Sequence[str] = (),
    **reused: Any,
) -> dict[str, Any]:
    given = {"taps": keeps, "reuse": reused} if keeps or reused else {}  # not all networks have intermediates
    out, found = apply(build(config)[0], weights[role], latent, time, TextContext(sequence, mask, pooled), **given)
    return {"prediction": out, **{name: found[name] for name in keeps}}
