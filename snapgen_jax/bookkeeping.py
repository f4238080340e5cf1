"""What has been done is on record, so that a long piece of work that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from snapgen_jax.training.appended import AppendedFile, read_appended
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole

Json = Any


class Stages:
    """Runs each part once per file and config: its result is kept in that file, with the seconds spent, those of parts
    that were stopped included."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._done: dict[str, Any] = {"seconds": 0.0, "parts": {}}
        if self._path.exists():
            self._done |= {k: v for k, v in json.loads(self._path.read_text()).items() if k in self._done}
        self._since = time.monotonic()

    def has(self, name: str, config: Json) -> bool:
        """Whether a part is on record with this config (all that it depends on, as JSON)."""
        return self._done["parts"].get(name, {}).get("config") == _label(config)

    def run(self, name: str, config: Json, part: Callable[[], Json]) -> Json:
        """The result of a part, computed now, or before with the same config."""
        if not self.has(name, config):
            print(f"\n== {name} ==", flush=True)
            try:
                self._done["parts"][name] = {"config": _label(config), "numbers": part()}
            except ValueError:  # refused: nothing was done, and nothing is written
                raise
            except BaseException:
                self._store()
                raise
            self._store()
        return self._done["parts"][name]["numbers"]

    def forget(self, name: str) -> None:
        """The part is to be done again when it is next asked for."""
        self._done["parts"].pop(name, None)
        self._store()

    def minutes(self) -> float:
        """Minutes spent in all, over restarts."""
        self._store()
        return self._done["seconds"] / 60

    def _store(self) -> None:
        now = time.monotonic()
        self._done["seconds"] += now - self._since
        self._since = now
        write_whole(self._path, json.dumps(self._done))


class Items:
    """The finished items of one piece of work, each a line of `items.jsonl` in its workdir.

    A workdir has one `Items` at a time. An item is finished when its line is whole: a last line that a crash cut short
    is dropped, and that item is done again.
    """

    def __init__(self, workdir: epath.PathLike):
        """Reads what is finished.

        Raises:
            ConfigError: a whole line of the file is not an item, or a segment of it is missing.
        """
        self._path = epath.Path(workdir) / "items.jsonl"
        self._file = AppendedFile(self._path)
        data = read_appended(self._path)
        whole = data[: data.rfind(b"\n") + 1]
        self._file.cut(len(whole))
        self._values: dict[str, Json] = {}
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                item = json.loads(line)
                self._values[item["name"]] = item["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self._path}, line {number} is not an item: {error!r}; expected an object with `name` and "
                    "`value`. Delete the line, and its item is done again"
                ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """The items that are finished, in the order in which they were."""
        return tuple(self._values)

    def run(self, name: str, function: Callable[[], Json]) -> Json:
        """The value of an item as JSON has it, computed now or before.

        Args:
            name: of the item, another for each.
            function: computes it; a value that JSON has: no NaN, no arrays.

        Raises:
            ConfigError: the value is none that JSON has.
        """
        if name not in self._values:
            print(f"{name} ...", flush=True)
            value = as_json(function(), f"item {name!r}")
            self._file.append((json.dumps({"name": name, "value": value}) + "\n").encode())
            self._values[name] = value
        return self._values[name]


def as_json(value: Any, what: str) -> Json:
    """A value as it is when read back from JSON: tuples are lists, keys are strings.

    Raises:
        ConfigError: JSON has no such value; names `what` it is.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{what} is not JSON: {error}; return dicts, lists, strings, finite numbers, booleans and None"
        ) from error


def _label(config: Json) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
