"""The published text encoders and the conditioner as functions to convert: batch 1, float32.

An encoder of more parameters than `UNIT_PARAMETERS` is several units, each of some of its layers, which a client calls
in turn. An encoder that a bundle leaves out is to the conditioner what it is where training drops it: zeros that are
masked. The functions are partial applications of functions of this file, so that a unit travels to another process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.inputs._images import ImageCodec
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.module import apply, build, count_parameters
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exports import ExportUnit, InputsExport

Tree = Any
UNIT_PARAMETERS = 350_000_000  # 1.4 GB in float32, of the 2 GiB that a `.tflite` file may have
_EMBEDDING = ("token_embedding", "position_embedding", "neighbours")
_HEAD = ("norm", "projection")


def published_export(
    encoders: Mapping[str, Any],
    lengths: Mapping[str, int],
    conditioner: tuple[str, ConditionerConfig],
    shapes: Mapping[str, tuple[int, int, int]],
    images: ImageCodec,
) -> InputsExport:
    """What published text encoders, a conditioner and a decoder bring to a bundle.

    Args:
        encoders: `{encoder: its config}` of those that the bundle holds; their roles have their names.
        lengths: of their token ids.
        conditioner: its role and config.
        shapes: of every encoder, held or not: its tokens, width of states, and width of the pooled vector.
        images: the codec.

    Raises:
        ValueError: an encoder cannot be split into units of `UNIT_PARAMETERS`.
    """
    held = [name for name in ENCODERS if name in encoders]
    join = conditioner_unit(*conditioner, shapes, held)
    units = [unit for name in held for unit in text_units(name, encoders[name], lengths[name])]
    inputs: dict[str, np.ndarray] = {name: np.zeros(lengths[name], np.int32) for name in held}
    tokenizers: list[dict[str, Any]] = [{"file": f"tokenizers/{name}.json", "tokens": name} for name in held]
    if "language" in held:
        inputs["language_mask"] = np.zeros(lengths["language"], np.float32)
        tokenizers[-1]["mask"] = "language_mask"
    spec = {conditioner[0]: build(conditioner[1])[1]}
    context = jax.eval_shape(join.function, spec, **join.inputs)
    return InputsExport(
        [*units, join],
        inputs,
        images.describe(),
        images.export_unit(),
        tokenizers=tokenizers,
        null_context={name: np.zeros(x.shape[1:], np.float32) for name, x in context.items()},
        context=TextContext(**context),
    )


def text_units(name: str, config: Any, length: int, most: int = UNIT_PARAMETERS) -> list[ExportUnit]:
    """A text encoder as units: its token ids to its states, and of a CLIP to its pooled vector.

    Args:
        name: of the encoder, of its role and of its token ids int32 `[1, L]`. What comes out is `<name>_states`
            `[1, L, D]` and, of a CLIP, `<name>_pooled` `[1, P]`. A language model also takes `<name>_mask` `[1, L]`.
        config: its `ClipTextConfig` or `Gemma2Config`.
        length: L.
        most: parameters of one unit; what has more is split between layers, as evenly as they allow.

    Raises:
        ValueError: one layer with what comes before or after it has more parameters than `most`.
    """
    config = dataclasses.replace(config, dtype="float32")
    bounds = layer_ranges(config, most)
    units = []
    for i, (first, last) in enumerate(bounds):
        before, after = (None if edge in (0, len(bounds)) else f"{name}_hidden_{edge}" for edge in (i, i + 1))
        arrays = {}
        if first == 0 or (last == config.layers and not _is_language(config)):  # CLIP pools where the text ends
            arrays[name] = jax.ShapeDtypeStruct((1, length), jnp.int32)
        if _is_language(config):
            arrays[f"{name}_mask"] = jax.ShapeDtypeStruct((1, length), jnp.float32)
        if before:
            arrays[before] = jax.ShapeDtypeStruct((1, length, config.width), jnp.float32)
        units.append(
            ExportUnit(
                name if len(bounds) == 1 else f"{name}_{i + 1}",
                functools.partial(_encode, name, config, (first, last), before, after),
                (name,),
                arrays,
                part=functools.partial(_parameters, name, config, (first, last)),
            )
        )
    return units


def layer_ranges(config: Any, most: int) -> list[tuple[int, int]]:
    """Which layers each unit of an encoder has, as `(first, end)`: as few units as `most` parameters allow, as even as
    the layers allow.

    Raises:
        ValueError: as for `text_units`.
    """
    sizes = _layer_sizes(config)
    if max(sizes) > most:
        raise ValueError(
            f"a text encoder's layer, with its token table, has {max(sizes):,} parameters; a unit holds {most:,} at "
            "most, because a .tflite file ends at 2 GiB. Leave this encoder out of the bundle"
        )
    fewest = len(_greedy(sizes, most))
    even = sum(sizes) / fewest
    for limit in (*np.linspace(even, most, 64), most):
        if max(sizes) <= limit and len(found := _greedy(sizes, limit)) == fewest:
            return found
    raise AssertionError("the last limit is that of `fewest`")


def _greedy(sizes: Sequence[int], limit: float) -> list[tuple[int, int]]:
    found, first, held = [], 0, 0
    for i, size in enumerate(sizes):
        if held + size > limit and i > first:
            found.append((first, i))
            first, held = i, 0
        held += size
    return [*found, (first, len(sizes))]


def _layer_sizes(config: Any) -> list[int]:
    """Parameters of each layer; the first with the tables before it, the last with what comes after it."""
    _, spec = build(config)
    if _is_language(config):
        sizes = [count_parameters(spec["blocks"]) // config.layers] * config.layers
    else:
        sizes = [count_parameters(spec["layers"][f"block_{i:02d}"]) for i in range(config.layers)]
    sizes[0] += sum(count_parameters(spec[part]) for part in _EMBEDDING if part in spec)
    sizes[-1] += sum(count_parameters(spec[part]) for part in _HEAD if part in spec)
    return sizes


def _parameters(name: str, config: Any, layers: tuple[int, int], weights: Mapping[str, Tree]) -> dict[str, Tree]:
    """Those parameters of an encoder that a unit of some of its layers reads."""
    (first, last), tree = layers, weights[name]
    read = (*(_EMBEDDING if first == 0 else ()), *(_HEAD if last == config.layers else ()))
    held = {part: tree[part] for part in read if part in tree}
    if _is_language(config):
        held["blocks"] = {i: jax.tree.map(lambda x, i=i: x[i : i + 1], tree["blocks"]) for i in range(first, last)}
    else:
        held["layers"] = {f"block_{i:02d}": tree["layers"][f"block_{i:02d}"] for i in range(first, last)}
    return {name: held}


def _encode(
    name: str,
    config: Any,
    layers: tuple[int, int],
    before: str | None,
    after: str | None,
    weights: Mapping[str, Tree],
    **arrays: Any,
) -> dict[str, jax.Array]:
    """Runs some layers of an encoder; `before` and `after` name the states that come in and go out in between."""
    (first, last), (network, spec), held = layers, build(config), weights[name]
    x: Any = arrays[before] if before else None
    length = (arrays[name] if x is None else x).shape[1]
    ids = arrays.get(name, jax.ShapeDtypeStruct((1, length), jnp.int32))
    # Parameters that these layers do not read stand there as shapes.
    if _is_language(config):
        for i in range(first, last):  # a layer at a time: a slice of a stack would not be folded into its weights
            whole = {**spec, **held, "blocks": held["blocks"][i]}
            x = apply(network, whole, ids, arrays[f"{name}_mask"], x, i, i + 1, method="part")
        out: Any = x
    else:
        whole = {**spec, **held, "layers": {**spec["layers"], **held["layers"]}}
        everything = jnp.ones((1, length))  # CLIP was trained to see all 77 tokens
        out = apply(network, whole, ids, everything, x, first, last, method="part")
    if after:
        return {after: out}
    pooled = {} if _is_language(config) else {f"{name}_pooled": out.pooled}
    return {f"{name}_states": out.sequence, **pooled}


def conditioner_unit(
    role: str, config: ConditionerConfig, shapes: Mapping[str, tuple[int, int, int]], kept: Sequence[str]
) -> ExportUnit:
    """What joins the encoders' states to the context of the denoiser: sequence `[1, L, D]`, mask and pooled.

    Args:
        role: whose weights it has.
        config: of the conditioner.
        shapes: of each encoder, its tokens, width of states, and width of the pooled vector.
        kept: the encoders that the bundle holds. The others are left out as training leaves them out; without the
            language model its tokens, which would all be masked, are not there at all.
    """
    config, language = dataclasses.replace(config, dtype="float32"), "language" in kept
    arrays = {}
    for name in kept:
        tokens, width, pooled = shapes[name]
        arrays[f"{name}_states"] = (1, tokens, width)
        arrays |= {f"{name}_mask": (1, tokens)} if name == "language" else {f"{name}_pooled": (1, pooled)}
    return ExportUnit(
        "conditioner",
        functools.partial(_join, role, config, dict(shapes), tuple(kept)),
        (role,) if language else (),  # it joins the CLIPs without a parameter
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in arrays.items()},
    )


def _join(
    role: str,
    config: ConditionerConfig,
    shapes: Mapping[str, tuple[int, int, int]],
    kept: tuple[str, ...],
    weights: Mapping[str, Tree],
    **arrays: Any,
) -> dict[str, jax.Array]:
    network, spec = build(config)

    def encoding(name: str) -> TextContext:
        tokens, width, pooled = shapes[name]
        if name not in kept:
            return TextContext(jnp.zeros((1, tokens, width)), jnp.zeros((1, tokens)), jnp.zeros((1, pooled)))
        mask = arrays[f"{name}_mask"] if name == "language" else jnp.ones((1, tokens))
        return TextContext(arrays[f"{name}_states"], mask, arrays.get(f"{name}_pooled", jnp.zeros((1, pooled))))

    clips, language = (encoding("clip_l"), encoding("clip_g")), "language" in kept
    context = apply(network, weights[role] if language else spec, *clips, encoding("language") if language else None)
    return {"sequence": context.sequence, "mask": context.mask, "pooled": context.pooled}


def _is_language(config: Any) -> bool:
    return isinstance(config, Gemma2Config)
