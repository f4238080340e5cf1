"""Stages of a chain that derive: a function of earlier runs whose result later configs take values of.

A method that changes the architecture (a searched depth, bits a layer, LoRA ranks, evolved blocks) is such a function:

    def depth(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
        items, losses = Items(workdir), {}
        for n in options["depths"]:
            losses[n] = items.run(f"depth {n}", lambda n=n: validation_loss(stages["teacher"], n))
        return {"depth": min(losses, key=losses.get)}

`stages` has the workdirs of the stages that its `earlier` names, by its keys. The function may evaluate, and train
through the same loop in sub-runs of its own `workdir`; what it keeps as `Items` is not done again after a stop. The
result is a JSON object and is written last, as `derived.json`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from snapgen_jax.bookkeeping import Json, as_json
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole
from snapgen_jax.typed import closest

FILE = "derived.json"
Derive = Callable[[Mapping[str, epath.Path], epath.Path, Mapping[str, Any]], Json]


def function_of(stage: str, path: str) -> Derive:
    """The function that a stage names as "module.path:function".

    Raises:
        ConfigError: the module or the function is not there, or it takes other arguments.
    """
    where = f"stage {stage!r}: derive={path!r}"
    module_name, colon, name = path.partition(":")
    if not (colon and name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ConfigError(f'{where} is no name of a function; write "module.path:function"')
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{where}: {module_name} cannot be imported: {error}; it must be installed, or in a folder of PYTHONPATH"
        ) from error
    public = {name: value for name, value in vars(module).items() if inspect.isroutine(value)}
    if name not in public:
        raise ConfigError(f"{where}: {module_name} has no function {name!r}{closest(name, public)}")
    try:
        inspect.signature(public[name]).bind({}, epath.Path(), {})
    except TypeError as error:
        raise ConfigError(f"{where} must take (stages, workdir, options): {error}") from error
    return public[name]


def derive(
    function: Derive, what: str, stages: Mapping[str, epath.Path], workdir: epath.Path, options: Json, example: Json
) -> Json:
    """What a function derives; kept in `derived.json` of its workdir, and read from there if it is already.

    Args:
        function: see `function_of`.
        what: "stage 'search' (module:function)", for errors.
        stages: workdirs of earlier stages, by the names that the function knows them by.
        workdir: of the stage.
        options: of the function.
        example: what the result must look like, see `check_like`.

    Raises:
        ConfigError: the result is no JSON object, or does not look like the example.
    """
    file = workdir / FILE
    if file.exists():
        return read(file, what, example)
    value = as_json(function(stages, workdir, options), f"what {what} derived")
    check_like(example, value, what)
    write_whole(file, json.dumps(value, indent=2) + "\n")
    return value


def read(file: epath.Path, what: str, example: Json) -> Json:
    """What a `derived.json` holds.

    Raises:
        ConfigError: it does not look like the example, or is not JSON.
    """
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}; delete it, and {what} derives it again") from error
    try:
        check_like(example, value, what)
    except ConfigError as error:
        raise ConfigError(f"{error}; or delete {file}, and it is derived again") from error
    return value


def check_like(example: Json, value: Json, what: str, where: str = "") -> None:
    """Checks that a value has the structure of an example.

    An object has at least the example's keys. Element i of a list is like the example's element i; further ones are
    like its last. A number with a decimal point in the example may be derived without one.

    Raises:
        ConfigError: a key is missing, or a value has another type.
    """
    named = repr(where) if where else "its result"
    correct = "correct the function, or the stage's `example` in the chain's config"
    expected, derived = type(example), type(value)
    if derived is not expected and (expected, derived) != (float, int):
        raise ConfigError(
            f"{what} derived {value!r} ({derived.__name__}) as {named}, and the example has {example!r} "
            f"({expected.__name__}); {correct}"
        )
    if isinstance(example, dict):
        for key, like in example.items():
            inner = f"{where}.{key}" if where else key
            if key not in value:
                raise ConfigError(f"{what} derived no {inner!r}, which the example has; {correct}")
            check_like(like, value[key], what, inner)
    elif isinstance(example, list) and example:
        for i, element in enumerate(value):
            check_like(example[min(i, len(example) - 1)], element, what, f"{where}[{i}]")


def taken(value: Json, path: str) -> Json:
    """The value at a dotted path of a derived result.

    Raises:
        KeyError: there is none; names the part that is missing, and what stands there.
    """
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(f"no {part!r}" + (closest(part, value) if isinstance(value, dict) else f" in {value!r}"))
        value = value[part]
    return value
