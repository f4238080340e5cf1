"""Rewrites the configs of workdirs that an earlier version wrote, so that this one reads them. Checkpoints stay as they
are.

Schema 1 named the network, its inputs and their shapes in one flat section for each combination of method and inputs;
schema 2 has a section `network`, a section `inputs`, and a recipe for the method alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from snapgen_jax.config import SCHEMA, complete, to_json
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole

Section = dict[str, Any]
FILES = ("config.json", "began.json")


def upgrade(workdir: epath.PathLike) -> list[str]:
    """Rewrites `config.json` of a workdir, and of the runs below it where it is a chain's.

    Every new text is made and checked before the first file is written; a file that is up to date is left alone.

    Returns:
        the files that were rewritten.

    Raises:
        ConfigError: there is no config, or one that cannot be rewritten; nothing is written then.
    """
    root = epath.Path(workdir)
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.exists() else []
    files = [folder / name for folder in folders for name in FILES if (folder / name).exists()]
    if not files:
        raise ConfigError(f"{workdir} is not a workdir: neither it nor a folder in it has a config.json")
    changed: dict[epath.Path, str] = {}
    for file in files:
        try:
            values = json.loads(file.read_text())
            if file.name == "config.json":
                if values.get("schema", 1) < SCHEMA:
                    changed[file] = to_json(complete(upgraded(values)))
            else:
                began = {stage: _text(text) for stage, text in values.items()}
                if began != values:
                    changed[file] = json.dumps(began)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ConfigError) else repr(error)
            raise ConfigError(f"{file} cannot be rewritten, and nothing was changed: {reason}") from error
    for file, text in changed.items():
        write_whole(file, text)
    return [str(file) for file in changed]


def _text(text: str) -> str:
    values = json.loads(text)
    return text if "derive" in values or values.get("schema", 1) >= SCHEMA else to_json(complete(upgraded(values)))


def upgraded(old: Mapping[str, Any]) -> Section:
    """A config of schema 1 as one of schema 2.

    Raises:
        ConfigError: its recipe is not one of that schema.
    """
    if "system" in old:
        return dict(old)
    recipe = old.get("recipe", "flow_matching")
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {recipe!r} of an earlier version; it had {', '.join(RECIPES)}")
    return RECIPES[recipe](dict(old))


def _take(config: Section, *names: str) -> Section:
    return {name: config.pop(name) for name in names if name in config}


def _network(config: Section) -> Section:
    """The chosen one of the sections `unet` and `mmdit`, both of which are removed."""
    sections = _take(config, "unet", "mmdit")
    kind = config.pop("network", "unet")
    network = {"kind": kind, **sections.get(kind, {})}
    # All scores at once was the default of every platform; which kernel computes them changes nothing that is learnt.
    return {**network, "attention": "auto"} if network.get("attention") == "whole" else network


def _schedule(config: Section) -> Section:
    return {"schedule": {"kind": "flow", **config.pop("timesteps")}} if "timesteps" in config else {}


def _captions(config: Section) -> Section:
    return {"kind": "captions", **_take(config, "image_sizes", "text", "text_workdir", "codec", "caption_dropout")}


def _flow_matching(config: Section) -> Section:
    parts = {"network": _network(config), "inputs": _captions(config), **_schedule(config)}
    return {**config, **parts}


def _stored(config: Section, network: Mapping[str, Any]) -> Section:
    widths = {name: network[name] for name in ("latent_channels", "context_width") if name in network}
    if "pooled_width" in network:
        widths["pooled_width"] = network["pooled_width"] or 0
    taken = _take(config, "image_sizes", "reduction", "context_tokens", "caption_dropout")
    return {"kind": "stored", **taken, **widths}


def _latent_flow_matching(config: Section) -> Section:
    network = _network(config)
    parts = {"recipe": "flow_matching", "network": network, "inputs": _stored(config, network), **_schedule(config)}
    return {**config, **parts}


def _t2i_flow_matching(config: Section) -> Section:
    encoders = config.pop("encoders", {})
    inputs = {"kind": "encoders", **_take(config, "image_sizes", "codec", "conditioner", "encoder_dropout"), **encoders}
    parts = {"recipe": "flow_matching", "network": _network(config), "inputs": inputs, **_schedule(config)}
    return {**config, **parts}


def _teacher(config: Section, inputs: Mapping[str, Any]) -> Section:
    """A teacher with a text encoder or latents of its own has inputs of its own."""
    teacher = dict(config.pop("teacher", {}))
    teacher.setdefault("network", "mmdit")
    text, codec = teacher.pop("text", None), teacher.pop("codec", None)
    network = _network(teacher)
    takes = [*(["condition"] if text else []), *(["latent"] if codec else [])]
    own = {}
    if takes:
        chosen = {"text": text} if text else {name: inputs[name] for name in ("text", "text_workdir") if name in inputs}
        own = {"inputs": {"kind": "captions", "codec": codec or inputs["codec"], **chosen}, "takes": takes}
    return {**teacher, "network": network, **own}


def _trunk(config: Section) -> None:
    """A trunk of the run that training starts from needs no name any more."""
    if config.get("trunk_workdir") == config.get("init_from"):
        config.pop("trunk_workdir", None)


def _distillation(config: Section) -> Section:
    _trunk(config)
    new = _flow_matching(config)
    return {**new, "teacher": _teacher(new, new["inputs"])}


def _latent_distillation(recipe: str) -> Callable[[Section], Section]:
    def rewrite(config: Section) -> Section:
        _trunk(config)
        tokens = config.pop("teacher_context_tokens", 333)
        new = _latent_flow_matching(config)
        teacher = dict(new.pop("teacher", {}))
        teacher.setdefault("network", "mmdit")
        own_latents = teacher.pop("codec", None)
        teacher.pop("text", None)
        network = _network(teacher)
        inputs = _stored({"context_tokens": tokens}, network)
        inputs |= {"prefix": "teacher_"} if own_latents else {"prefix": "teacher_", "latent_channels": 0}
        takes = ["condition", *(["latent"] if own_latents else [])]
        return {**new, "recipe": recipe, "teacher": {**teacher, "network": network, "inputs": inputs, "takes": takes}}

    return rewrite


def _contrastive(config: Section) -> Section:
    side = config["image"]["image_size"]
    inputs = {"kind": "captions", "image_sizes": [[side, side]], **_take(config, "text"), "caption_dropout": 0.0}
    inputs |= {"codec": {"kind": "identity"}}
    return {**config, "inputs": inputs}


def _autoencoder(config: Section) -> Section:
    """The weight of the divergence was that of a mean over the latent, beside means over the image."""
    inputs = {"kind": "images", **_take(config, "image_sizes")}
    network = config["autoencoder"]
    reduction = 2 ** (len(network["channels"]) - 1)
    of_an_image = 3 * reduction**2 / network["latent_channels"]  # its values, for each of the latent
    weight = config.pop("kl") * of_an_image
    return {**config, "inputs": inputs, "kl_weight": weight}


def _decoder_distillation(config: Section) -> Section:
    generator = {"generator": _flow_matching(dict(config.pop("generator")))} if "generator" in config else {}
    inputs = {"kind": "images", **_take(config, "image_sizes", "codec")}
    return {**config, "inputs": inputs, **generator}


RECIPES: dict[str, Callable[[Section], Section]] = {
    "flow_matching": _flow_matching,
    "latent_flow_matching": _latent_flow_matching,
    "t2i_flow_matching": _t2i_flow_matching,
    "distillation": _distillation,
    "latent_distillation": _latent_distillation("distillation"),
    "adversarial": _distillation,
    "latent_adversarial": _latent_distillation("adversarial"),
    "contrastive": _contrastive,
    "autoencoder": _autoencoder,
    "decoder_distillation": _decoder_distillation,
}
