"""Networks of a run in the layouts that other libraries load: CLIP's text encoder in that of transformers, the
autoencoder in that of diffusers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.module import build, flatten
from snapgen_jax.weights.folder import MODEL, write_safetensors
from snapgen_jax.weights.mapping import to_reference
from snapgen_jax.weights.maps import clip, sd3_autoencoder

Tree = Any
FOLDERS = {ClipTextConfig: "text_encoder", AutoencoderConfig: "vae"}
_SPECIAL = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>"}  # of `data.tokenizer`


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """A network of a run, as another library has it.

    Attributes:
        role: the network, "player/role".
        reader: the library that loads it, "transformers" or "diffusers".
        loader: its class there.
        folder: where it was written, in the folder of weights; "" where it could not be.
        note: why it could not be, or what its user must know.
    """

    role: str
    reader: str
    loader: str
    folder: str = ""
    note: str = ""


def write_counterparts(
    folder: pathlib.Path, config: Any, weights: Tree, shard_bytes: int, tokenizer: str | None = None
) -> list[Counterpart]:
    """Writes each network of a run that transformers or diffusers has, in a folder of its own.

    Args:
        folder: of the run's weights.
        config: the recipe's, a dataclass; the networks are found among its fields.
        weights: `{player: {role: parameters}}`.
        shard_bytes: as for `write_safetensors`.
        tokenizer: contents of the run's `tokenizer.json`, which goes with the text encoder.
    """
    found = []
    for role, network, params in _networks(config, weights):
        name = FOLDERS[type(network)]
        if (folder / name).exists():
            name += f"_{sum(part.folder.startswith(name) for part in found) + 1}"
        if isinstance(network, ClipTextConfig):
            found.append(_write_clip(folder / name, role, network, params, shard_bytes, tokenizer))
        else:
            found.append(_write_autoencoder(folder / name, role, network, params, shard_bytes))
    return found


def _networks(config: Any, weights: Tree) -> Iterator[tuple[str, Any, Tree]]:
    """`("player/role", config, parameters)` of the networks that a player holds and another library has."""
    known = {_shapes(build(network)[1]): network for network in _configs(config)}
    for player, roles in weights.items():
        for role, params in roles.items() if isinstance(roles, Mapping) else ():
            if isinstance(params, Mapping) and (network := known.get(_shapes(params))) is not None:
                yield f"{player}/{role}", network, params


def _configs(value: Any) -> Iterator[Any]:
    """The configs of such networks among the fields of a dataclass, those of dataclasses in it included."""
    if isinstance(value, tuple(FOLDERS)):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _configs(getattr(value, field.name))


def _shapes(tree: Tree) -> frozenset[tuple[Any, ...]]:
    return frozenset((path, tuple(leaf.shape)) for path, leaf in flatten(tree).items())


def _write_clip(
    folder: pathlib.Path, role: str, config: ClipTextConfig, params: Tree, shard_bytes: int, tokenizer: str | None
) -> Counterpart:
    made = Counterpart(role, "transformers", "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel")
    moved = config.pooling == "eos" and config.eos_id == 2
    if moved:
        config, params = clip.move_end(config, params)
    try:
        values = clip.write_config(config)
    except ValueError as error:
        return dataclasses.replace(made, note=str(error))
    folder.mkdir()
    tensors = to_reference(clip.weight_map(config), params)
    if not config.key_bias:  # softmax removes it, so that CLIP's is nought
        wanted = clip.weight_map(dataclasses.replace(config, key_bias=True))
        names = {name for rule in wanted.rules for name in rule.names}
        tensors |= {name: np.zeros(config.width, np.float32) for name in sorted(names - tensors.keys())}
    write_safetensors(folder, MODEL, tensors, shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer is not None:
        _write_tokenizer(folder, config, json.loads(tokenizer), moved)
    note = "the ids of its end token and of the last token are exchanged; use the tokenizer beside it" if moved else ""
    return dataclasses.replace(made, folder=folder.name, note=note)


def _write_tokenizer(folder: pathlib.Path, config: ClipTextConfig, values: dict[str, Any], moved: bool) -> None:
    """The run's tokenizer as transformers loads it: with the frame of `<bos>` and `<eos>`, and the encoder's ids."""
    ids = {"eos": config.eos_id, "bos": config.bos_id, "pad": config.pad_id}
    if moved:
        before, last = values["model"]["vocab"][_SPECIAL["eos"]], config.vocab_size - 1
        exchanged = {before: last, last: before}
        values["model"]["vocab"] = {t: exchanged.get(i, i) for t, i in values["model"]["vocab"].items()}
        for token in values["added_tokens"]:
            token["id"] = exchanged.get(token["id"], token["id"])
        values["added_tokens"].sort(key=lambda token: token["id"])
    frame = [("bos", "SpecialToken"), ("A", "Sequence"), ("eos", "SpecialToken")]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{kind: {"id": _SPECIAL.get(name, name), "type_id": 0}} for name, kind in frame],
        "pair": [{kind: {"id": n, "type_id": 0}} for n, kind in (("A", "Sequence"), ("B", "Sequence"))],
        "special_tokens": {
            _SPECIAL[name]: {"id": _SPECIAL[name], "ids": [ids[name]], "tokens": [_SPECIAL[name]]}
            for name in ("bos", "eos")
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(values, indent=2) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_tokens,
        "padding_side": "right",
        "split_special_tokens": True,
        **{f"{name}_token": token for name, token in _SPECIAL.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _write_autoencoder(
    folder: pathlib.Path, role: str, config: AutoencoderConfig, params: Tree, shard_bytes: int
) -> Counterpart:
    values, note = sd3_autoencoder.write_config(config), ""
    if config.normalisation == "measured":
        statistics = params["statistics"]
        params = {name: tree for name, tree in params.items() if name != "statistics"}
        values |= {"scaling_factor": 1.0, "shift_factor": 0.0}
        values |= {"latents_mean": np.asarray(statistics["bias"]).tolist()}
        values |= {"latents_std": np.asarray(statistics["scale"]).tolist()}
        note = "normalised by `latents_mean` and `latents_std`, per channel"
    folder.mkdir()
    tensors = to_reference(sd3_autoencoder.weight_map(config), params)
    write_safetensors(folder, "diffusion_pytorch_model", tensors, shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return Counterpart(role, "diffusers", "AutoencoderKL", folder.name, note)
