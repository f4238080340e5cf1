"""Experiments as data: a file in `configs/`, completed with the defaults of our dataclasses, then overridden.

A config file imports nothing of this package; `get_config(arg)` returns what it wants to say (`config_file`). Every key
that it leaves out has the default of the dataclass that will receive it, and every key that no dataclass knows is
refused with the closest match. A section may name a `preset` of its dataclass and change fields of that.

The way of a config through a run: `load_experiment(spec, overrides)` reads, completes and checks it, and builds each of
its dataclasses, once; what comes later takes the `Resolved` and builds none again.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from snapgen_jax import overrides as changes_of
from snapgen_jax import typed
from snapgen_jax.config_file import read
from snapgen_jax.data.config import DataConfig
from snapgen_jax.inputs.interfaces import StoredInputsConfig
from snapgen_jax.networks.attention_table import check_named
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.typed import closest

Config = Mapping[str, Any] | ConfigDict
SCHEMA = 2  # of `config.json`: goes up when a config of before cannot be completed as it is


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(LoopConfig):
    """What every experiment has, whatever its recipe; the recipe's own fields stand beside these.

    Attributes:
        recipe: name of a module under `snapgen_jax.recipes`.
        init_from: workdir of an earlier stage to start from; the folder `unet/` or `vae/` of a published Stable
            Diffusion before the third; or "".
        data: where examples come from.
    """

    recipe: str = "flow_matching"
    init_from: str = ""
    data: DataConfig = DataConfig()


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


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The completed config of an experiment, and the dataclasses that it fills, each built once.

    Attributes:
        config: every key with its value, locked.
        experiment: the part that every experiment has.
        recipe_class: the method.
        recipe: the method's part, an instance of `recipe_class.Config`.
    """

    config: ConfigDict
    experiment: ExperimentConfig
    recipe_class: Any
    recipe: Any

    def drawing(self) -> Resolved:
        """The same method where prompts are to be drawn: of stored inputs, with their encoders on pictures and captions
        in place of what is stored, if the config names weights of these; else as it is."""
        inputs = vars(self.recipe).get("inputs")
        unstored = inputs.unstored() if isinstance(inputs, StoredInputsConfig) else None
        if unstored is None:
            return self
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, inputs=unstored))

    def start(self, platform: str) -> Recipe:
        """The method for training on a platform: as `build`, but a kernel of attention that the config names must run
        there. A run that exists is drawn from and exported anywhere, by whatever kernel runs.

        Raises:
            ConfigError: as `build`; or a kernel does not run on the platform, or not in the dtype of its network.
        """
        try:
            check_named(self.recipe, platform)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return self.build(platform)

    def build(self, platform: str) -> Recipe:
        """The method for a platform, "cpu", "gpu" or "tpu".

        Raises:
            ConfigError: its fields do not fit each other.
        """
        try:
            return self.recipe_class(self.recipe, platform)
        except ValueError as error:
            raise ConfigError(f"recipe {self.experiment.recipe!r}: {error}") from error


def load_experiment(spec: str, overrides: Sequence[str] = ()) -> Resolved:
    """Reads the experiment "path/to/file.py" or "path/to/file.py:arg", with overrides "a.b=value".

    Raises:
        ConfigError: as for `load_config`; or the file describes a published system.
    """
    return resolve(read_one(spec), overrides, spec)


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads "path/to/file.py" or "path/to/file.py:arg", completes it, and applies overrides "a.b=value".

    Raises:
        ConfigError: the file is missing or has no `get_config`; a key is unknown; a value has the wrong type.
    """
    return complete(read_one(spec), overrides)


def read_one(spec: str) -> Config:
    """What a config file says of one run or of one published system; not of a chain.

    Raises:
        ConfigError: the file is missing, has no `get_config`, or describes a chain.
    """
    partial = read(spec)
    if "stages" in partial:
        raise ConfigError(f"{spec} describes a chain of runs; run it with `snapgen chain --config={spec}`")
    return partial


def complete(partial: Config, overrides: Sequence[str] = ()) -> ConfigDict:
    """Applies the overrides, fills in every default, checks every key and value, and locks the result."""
    return _complete(partial, overrides)[0]


def resolve(partial: Config, overrides: Sequence[str] = (), name: str = "this config") -> Resolved:
    """The completed config of an experiment with its dataclasses; from a completed config too.

    Args:
        partial: what a config file returns, or a completed config.
        overrides: "a.b=value" each.
        name: of the config, for errors.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or the config describes a published system.
    """
    config, built = _complete(partial, overrides)
    if "system" in config:
        raise ConfigError(f"{name} describes a published system, which is not trained; see `snapgen sample`")
    experiment, recipe = built
    return Resolved(config, experiment, recipe_class(experiment.recipe), recipe)


def _complete(partial: Config, overrides: Sequence[str]) -> tuple[ConfigDict, tuple[Any, ...]]:
    """The completed config, and the dataclasses that it fills."""
    changes = [changes_of.parse_override(text) for text in overrides]
    wanted: dict[str, Any] = _plain(partial)
    wanted |= {path[0]: value.of(str) for path, value in changes if path in (["recipe"], ["system"])}
    classes = _classes(wanted)
    changes_of.apply(wanted, changes, classes)
    fields = [{field.name for field in dataclasses.fields(cls)} for cls in classes]
    known = set().union(*fields)
    for name in wanted:
        if name not in known:
            of = "" if "system" in wanted else f" of recipe {wanted.get('recipe', ExperimentConfig.recipe)!r}"
            raise ConfigError(f"unknown config key {name!r}{of}{closest(name, known)}")
    built = tuple(
        _build(cls, {k: v for k, v in wanted.items() if k in names}) for cls, names in zip(classes, fields, strict=True)
    )
    config = ConfigDict({k: v for instance in built for k, v in typed.plain(instance).items()})
    config.lock()
    return config, built


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
    """A completed config as JSON, for `config.json` in a workdir; the number of its schema comes first."""
    ordered = json.loads(json.dumps(_plain(config), sort_keys=True))
    return json.dumps({"schema": SCHEMA, **ordered}, indent=2) + "\n"


def from_json(text: str, workdir: Any = "WORKDIR") -> ConfigDict:
    """The inverse of `to_json`, completed, so that a field that is newer than the file has its default.

    Args:
        text: as from `to_json`.
        workdir: whose config it is, for errors.

    Raises:
        ConfigError: another version wrote it, or it is damaged.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{workdir}: its config.json is no JSON: {error}; restore it from a copy") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{workdir}: its config.json holds no object; restore it from a copy")
    schema = values.pop("schema", 1)
    if schema < SCHEMA:
        raise ConfigError(
            f"this workdir was written by an earlier version; rewrite it once with `snapgen upgrade {workdir}`"
        )
    if schema > SCHEMA:
        raise ConfigError(
            f"{workdir} was written by a later version: its config has schema {schema}, and this version reads "
            f"{SCHEMA}; install the version of snapgen-jax that its run.json names"
        )
    return complete(values)


def _plain(node: Any) -> Any:
    if isinstance(node, ConfigDict):
        node = node.to_dict()
    if isinstance(node, list | tuple):
        return type(node)(_plain(v) for v in node)
    return {k: _plain(v) for k, v in node.items()} if isinstance(node, Mapping) else node


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    try:
        return typed.build(cls, values)
    except ValueError as error:
        raise ConfigError(str(error)) from error
