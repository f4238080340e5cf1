"""Experiments as data: a file in `configs/`, completed with the defaults of our dataclasses, then overridden.

A config file imports `ml_collections` and nothing of ours; `get_config(arg)` returns what it wants to say. Every key
that it leaves out has the default of the dataclass that will receive it, and every key that no dataclass knows is
refused with the closest match. A section may name a `preset` of its dataclass and change fields of that.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import pkgutil
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from snapgen_jax import typed
from snapgen_jax.data.config import DataConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.typed import closest

Config = Mapping[str, Any] | ConfigDict


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(LoopConfig):
    """What every experiment has, whatever its recipe; the recipe's own fields stand beside these.

    Attributes:
        recipe: name of a module under `snapgen_jax.recipes`.
        init_from: workdir of an earlier stage to start from, or "".
        data: where examples come from.
    """

    recipe: str = "flow_matching"
    init_from: str = ""
    data: DataConfig = DataConfig()


def recipe_names() -> list[str]:
    """The recipes there are: every public module under `snapgen_jax.recipes`."""
    return _modules("snapgen_jax.recipes")


def recipe_class(name: str) -> Any:
    """The class `RECIPE` of `snapgen_jax.recipes.<name>`; its attribute `Config` is its config dataclass.

    Raises:
        ConfigError: there is no such recipe; names the closest.
    """
    return _named("recipe", "snapgen_jax.recipes", name).RECIPE


def system_class(name: str) -> Any:
    """The class `SYSTEM` of `snapgen_jax.systems.<name>`; its attribute `Config` is its config dataclass.

    Raises:
        ConfigError: there is no such system; names the closest.
    """
    return _named("system", "snapgen_jax.systems", name).SYSTEM


def _modules(package: str) -> list[str]:
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def _named(what: str, package: str, name: str) -> types.ModuleType:
    if name not in _modules(package):
        raise ConfigError(f"unknown {what} {name!r}{closest(name, _modules(package))}")
    return importlib.import_module(f"{package}.{name}")


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads "path/to/file.py" or "path/to/file.py:arg", completes it, and applies overrides "a.b=value".

    Raises:
        ConfigError: the file is missing or has no `get_config`; a key is unknown; a value has the wrong type.
    """
    partial = read(spec)
    if "stages" in partial:
        raise ConfigError(f"{spec} describes a chain of runs; run it with `snapgen chain --config={spec}`")
    return complete(partial, overrides)


def read(spec: str) -> Config:
    """What the `get_config` of "path/to/file.py" or "path/to/file.py:arg" returns.

    Raises:
        ConfigError: the file is missing, has no `get_config`, or does not take the argument.
    """
    path, _, arg = spec.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"no config file {path!r}; give a path such as configs/shapes/quickstart.py")
    module_spec = importlib.util.spec_from_file_location(f"snapgen_config_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(arg=None); see configs/shapes/quickstart.py for an example")
    try:
        return module.get_config(arg or None)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: get_config({arg!r}) failed: {error}") from error


def complete(partial: Config, overrides: Sequence[str] = ()) -> ConfigDict:
    """Fills in every default, checks every key and value, applies the overrides, and locks the result."""
    changes = [parse_override(o) for o in overrides]
    # A preset decides what the defaults of its section are, so it comes before the values.
    wanted: dict[str, Any] = _plain(partial)
    for path, value in sorted(changes, key=lambda change: change[0][-1] != "preset"):
        node = wanted
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"config key {'.'.join(path)!r}: {part!r} is a value, not a section")
        node[path[-1]] = value
    classes = _classes(wanted)
    values: dict[str, Any] = {}
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown config key {name!r}{closest(name, known)}")
    for cls in classes:
        chosen = {k: v for k, v in wanted.items() if k in {field.name for field in dataclasses.fields(cls)}}
        values.update(typed.plain(_build(cls, chosen)))
    config = ConfigDict(values)
    config.lock()
    return config


def _classes(wanted: Mapping[str, Any]) -> tuple[type, ...]:
    """The dataclasses that receive a config: those of a published system, or of an experiment and its recipe."""
    if "system" in wanted:
        return (system_class(wanted["system"]).Config,)
    return ExperimentConfig, recipe_class(wanted.get("recipe", ExperimentConfig.recipe)).Config


def build(cls: type, config: Config) -> Any:
    """The dataclass `cls` with its fields taken from a completed config; keys of other classes are passed over."""
    plain = _plain(config)
    return _build(cls, {f.name: plain[f.name] for f in dataclasses.fields(cls) if f.name in plain})


def build_dataclass(cls: type, config: Config) -> Any:
    """The dataclass `cls` from a config that is all its own: every key is checked.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
    """
    return _build(cls, _plain(config))


def to_json(config: Config) -> str:
    """A completed config as JSON, for `config.json` in a workdir."""
    return json.dumps(_plain(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`, completed, so that a field that is newer than the file has its default."""
    return complete(json.loads(text))


def _plain(node: Any) -> Any:
    if isinstance(node, ConfigDict):
        node = node.to_dict()
    if isinstance(node, list | tuple):
        return type(node)(_plain(v) for v in node)
    return {k: _plain(v) for k, v in node.items()} if isinstance(node, Mapping) else node


def parse_override(text: str, flag: str = "--config.") -> tuple[list[str], Any]:
    """The path and the value of "a.b=value": a Python literal where it is one, and a string otherwise.

    Raises:
        ConfigError: there is no value; names the `flag` that it came with.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r} has no value; write {flag}{name}=VALUE")
    try:
        return name.split("."), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name.split("."), value


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    try:
        return typed.build(cls, values)
    except ValueError as error:
        raise ConfigError(str(error)) from error
