"""Reads config files: Python files with a `get_config(arg)`, which may build on other files of their `configs/` folder.

A config file imports `ml_collections`, the standard library and `configs.*`. While a file is read, `configs` means the
nearest folder of that name above the file, wherever the process runs and whatever else is called `configs`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from snapgen_jax.training.exits import ConfigError

PACKAGE = "configs"


def read(spec: str) -> Mapping[str, Any] | ConfigDict:
    """What the `get_config` of "path/to/file.py" or "path/to/file.py:arg" returns.

    Raises:
        ConfigError: the file is missing, imports what is not there, has no `get_config`, or fails; names the line.
    """
    path, _, arg = spec.partition(":")
    file = pathlib.Path(os.path.abspath(path))
    if not file.is_file():
        raise ConfigError(f"no config file {path!r}; give a path such as configs/shapes/quickstart.py")
    with _configs_above(file):
        try:
            partial = _get_config(file, path)(arg or None)
        except ConfigError:
            raise
        except ImportError as error:
            raise ConfigError(
                f"{path}: {error}; a config imports ml_collections, the standard library, and other files of its "
                f"`{PACKAGE}/` folder (from {PACKAGE}.shapes import quickstart)"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path}: get_config({arg!r}) failed: {error}") from error
        except Exception as error:  # a slip in a file of the user's
            if isinstance(error, KeyError) and arg and error.args == (arg,):
                raise ConfigError(
                    f"{path}: get_config knows no argument {arg!r}; the top of the file says which it takes"
                ) from error
            raise ConfigError(
                f"{_place(error, file)}: {type(error).__name__}: {error}; correct the config file"
            ) from error
    if not isinstance(partial, Mapping | ConfigDict):
        raise ConfigError(f"{path}: get_config({arg!r}) returned {partial!r}; return a ConfigDict, or a dict")
    return partial


def _get_config(file: pathlib.Path, path: str) -> Callable[[str | None], Any]:
    """The function of a config file, which takes one argument."""
    get_config = getattr(_run(file), "get_config", None)
    if get_config is None:
        raise ConfigError(f"{path} defines no get_config(arg=None); see configs/shapes/quickstart.py for an example")
    try:
        inspect.signature(get_config).bind(None)
    except TypeError as error:
        raise ConfigError(f"{path}: get_config must take one argument, `def get_config(arg=None)`: {error}") from error
    return get_config


def _place(error: Exception, file: pathlib.Path) -> str:
    """Where a config file went wrong, "FILE:LINE": in itself, or in one that it builds on."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    folder = next((parent for parent in file.parents if parent.name == PACKAGE), file.parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if folder in pathlib.Path(f.filename).parents]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)


def _run(file: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"snapgen_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file; a config's name ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _configs_above(file: pathlib.Path) -> Iterator[None]:
    """Makes `import configs...` find the nearest folder `configs` above a file, and nothing else of that name.

    An entry at the front of `sys.path` would not do: a regular package `configs` further on comes before a namespace
    package, and namespace packages of one name are merged. Whatever was imported as `configs` is back afterwards, and
    nothing of this file's is left, so that files of two checkouts do not mix. Without such a folder nothing changes.
    """
    folder = next((parent for parent in file.parents if parent.name == PACKAGE), None)
    if folder is None:
        yield
        return
    others, keep_no_bytecode = _take_out(), sys.dont_write_bytecode
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    sys.dont_write_bytecode = True  # its time stamps are whole seconds: an edit within one would not be seen
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = keep_no_bytecode
        _take_out()
        sys.modules.update(others)


def _take_out() -> dict[str, types.ModuleType]:
    """Removes `configs` and all that is in it from the imported modules; returns them."""
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]
    return {name: sys.modules.pop(name) for name in names}
