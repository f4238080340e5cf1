"""Adapters in the files of peft: `adapter_config.json` and `adapter_model.safetensors`, one folder a network.

A module of a network that is published under other names has its published name ("text_model.encoder.layers.0.
self_attn.q_proj"), so that peft, diffusers and transformers find it; one of ours has its path, with dots.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.lora import A, B, adapter_shapes, kind_of, module_of
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import build, flatten, unflatten
from snapgen_jax.weights.checkpoint import Reader, WeightsError, read_folder
from snapgen_jax.weights.maps import clip, gemma2, sd3_mmdit
from snapgen_jax.weights.published import read_json

Tree = Any
Path = tuple[str, ...]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAPS: dict[type, Any] = {MMDiTConfig: sd3_mmdit, ClipTextConfig: clip, Gemma2Config: gemma2}
# Kinds of adapters that add something else than B A.
_OTHERS = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "trainable_token_indices")
_MORE = ("modules_to_save", "layer_replication", "target_parameters", "alora_invocation_tokens")


def module_names(config: Any) -> dict[Path, tuple[str, ...]]:
    """`{path of a weight: names of the modules that hold it}` of a network that can be adapted; as many names as a
    stack has layers, else one.

    Args:
        config: of the network.
    """
    maps = _MAPS.get(type(config))
    rules = {rule.path: rule.names for rule in maps.weight_map(config).rules} if maps else {}
    names: dict[Path, tuple[str, ...]] = {}
    for path, leaf in flatten(build(config)[1]).items():
        kind, own = kind_of(path, leaf.shape), ".".join(module_of(path))
        if kind:
            layers = tuple(f"{own}.{i}" for i in range(leaf.shape[0])) if kind == "stack" else (own,)
            names[path] = tuple(name.removesuffix(".weight") for name in rules.get("/".join(path), layers))
    return names


def write_peft(folder: pathlib.Path, adapters: Tree, config: Any, *, rank: int, alpha: float, base: str = "") -> None:
    """Writes the adapters of one network, in float32.

    Args:
        folder: made if it is not there.
        adapters: `{... "kernel": {"lora_A": array, "lora_B": array}}`, see `networks.lora`.
        config: of the network.
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        base: says where the network is from, for those who read the files.
    """
    names, flat = module_names(config), flatten(adapters)
    shapes = {path: leaf.shape for path, leaf in flatten(build(config)[1]).items()}
    tensors, modules = {}, []
    for path in dict.fromkeys(path[:-1] for path in flat):
        a, b = (np.asarray(flat[*path, name], np.float32) for name in (A, B))
        kind = kind_of(path, shapes[path])
        for layer, module in enumerate(names[path]):
            modules.append(module)
            keys = _keys(module, kind)
            for key, matrix in zip(keys, (a, b), strict=True):
                tensors[key] = np.ascontiguousarray(matrix[layer] if kind == "stack" else matrix)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_peft(folder: pathlib.Path, config: Any) -> tuple[Tree, float]:
    """Reads the adapters of one network, ours or others'.

    Args:
        folder: holds the two files.
        config: of the network.

    Returns:
        The adapters as `write_peft` takes them, float32, and their scale. Where modules have several scales, these are
        in the matrices and the scale is 1. A layer of a stack that has none gets zeros.

    Raises:
        WeightsError: a file is missing or broken, a module is none of this network, a matrix has another shape, or the
            adapters are of another kind than W + s B A.
    """
    values, tensors = read_json(folder / CONFIG), read_folder(folder)
    _check_kind(folder, values)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(build(config)[1]).items()}
    places = {name: (path, i) for path, names in module_names(config).items() for i, name in enumerate(names)}
    left, pairs = set(tensors), {}
    with Reader(tensors) as reader:
        for module, (path, layer) in places.items():
            keys = _keys(module, kind_of(path, shapes[path]))
            if left.isdisjoint(keys):
                continue
            if missing := [key for key in keys if key not in left]:
                raise WeightsError(f"{folder} holds no {missing[0]}, and holds its other half; fetch it again")
            left -= set(keys)
            a, b = (reader.read(key, ()).astype(np.float32) for key in keys)
            _check_shapes(module, path, shapes[path], a, b)
            pairs[path, layer] = (a, b, _scale(values, module, a.shape[0]))
    if left:
        some = ", ".join(sorted(left)[:10])
        raise WeightsError(f"{folder} adapts what this {type(config).__name__} does not have: {some}")
    if not pairs:
        raise WeightsError(f"{folder} holds no adapter")
    scales = {scale for _, _, scale in pairs.values()}
    one = scales.pop() if len(scales) == 1 else None
    if one is None:
        pairs = {place: (a, np.float32(scale) * b, 1.0) for place, (a, b, scale) in pairs.items()}
    flat: dict[Path, np.ndarray] = {}
    for path in dict.fromkeys(path for path, _ in pairs):
        if kind_of(path, shapes[path]) == "stack":
            layers = {layer: pair[:2] for (of, layer), pair in pairs.items() if of == path}
            flat[*path, A], flat[*path, B] = _stacked(path, shapes[path], layers)
        else:
            flat[*path, A], flat[*path, B], _ = pairs[path, 0]
    return unflatten(flat), 1.0 if one is None else one


def _keys(module: str, kind: str | None) -> tuple[str, str]:
    if kind == "embedding":
        return f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _check_kind(folder: pathlib.Path, values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise WeightsError(f"{folder / CONFIG} has peft_type={values.get('peft_type')!r}; only 'LORA' is read")
    for name in (*_OTHERS, *_MORE):
        if values.get(name):
            raise WeightsError(f"{folder / CONFIG} has {name}={values[name]!r}; only plain LoRA is read: W + s B A")
    if values.get("bias", "none") != "none":
        raise WeightsError(f"{folder / CONFIG} has bias={values['bias']!r}; only 'none' is read")


def _scale(values: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module, alpha / sqrt(r) of rank-stabilised LoRA."""
    alpha = values["lora_alpha"]
    for pattern, other in (values.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _check_shapes(module: str, path: Path, shape: tuple[int, ...], a: np.ndarray, b: np.ndarray) -> None:
    expected = adapter_shapes(path, shape, a.shape[0] if a.ndim else 0)
    if kind_of(path, shape) == "stack":
        expected = expected[0][1:], expected[1][1:]
    if (a.shape, b.shape) != expected:
        raise WeightsError(
            f"the adapter of {module} has the shapes {list(a.shape)} and {list(b.shape)}; this network takes "
            f"{list(expected[0])} and {list(expected[1])}: it was made for another network"
        )


def _stacked(
    path: Path, shape: tuple[int, ...], layers: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """The adapters of a stack from those of its layers; zeros where there are none, or where the rank is smaller."""
    rank = max(a.shape[0] for a, _ in layers.values())
    a, b = (np.zeros(size, np.float32) for size in adapter_shapes(path, shape, rank))
    for layer, (low, high) in layers.items():
        a[layer, : low.shape[0]], b[layer, :, : low.shape[0]] = low, high
    return a, b


def roles_in(folder: pathlib.Path) -> Iterable[str]:
    """The folders of a folder that hold adapters, which are named after the roles of their networks: "unet", "text".

    Raises:
        WeightsError: there is none.
    """
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise WeightsError(f"{folder} holds no ROLE/{CONFIG}; `snapgen adapters export` writes such a folder")
    return found
