"""The `config.json` beside published weights: a network's config out of what diffusers or transformers wrote there."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from etils import epath

from snapgen_jax.weights.checkpoint import WeightsError

Config = TypeVar("Config")


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say something: one that is null has its default, as if it were left out."""
    return {key: value for key, value in values.items() if value is not None}


def read_json(file: pathlib.Path | epath.Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises:
        WeightsError: the file is missing, or holds no JSON object.
    """
    try:
        values = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(f"{file} is not there; give the folder that holds it") from error
    except ValueError as error:
        raise WeightsError(f"{file} is no JSON: {error}; fetch it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} holds no JSON object; fetch it again")
    return values


def read_config_file(file: pathlib.Path, read: Callable[[Mapping[str, Any]], Config]) -> Config:
    """A network's config from a `config.json`, by the `read_config` of its kind of checkpoint.

    Raises:
        WeightsError: the file is missing or damaged, lacks an entry, or describes a network that is not ours.
    """
    values = read_json(file)
    try:
        return read(values)
    except KeyError as error:
        raise WeightsError(f"{file} lacks {error.args[0]!r}; is it that of the right network?") from error
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{file}: {error}") from error
