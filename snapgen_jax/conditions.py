"""What a generator is told: conditions, as arrays of the batches that its recipe reads, and options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.data.tokenizer import CaptionTokenizer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.typed import closest, coerce


def prompt_arrays(
    recipe: Recipe, tokenizer: CaptionTokenizer, prompts: Sequence[str], names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays `[N, L]` that stand for N prompts in a recipe's batches; those of `names`, or all."""
    specs = next(iter(recipe.batch_specs().values()))
    wanted = specs.keys() if names is None else specs.keys() & set(names)
    return tokenizer.arrays(prompts, {name: specs[name].shape[1] for name in tokenizer.names if name in wanted})


def condition_arrays(recipe: Recipe, conditions: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Conditions `{name: [N, ...]}` as arrays of a recipe's batches; integers and floats become those of the batches.

    Raises:
        ValueError: the batches have no such array, or it has another shape or type there. All must fit one bucket.
        ConfigError: a value has no meaning, such as a class label beyond the last.
    """
    buckets = recipe.batch_specs()
    known = list(dict.fromkeys([name for specs in buckets.values() for name in specs] + ["noise"]))
    arrays = {}
    for name, value in conditions.items():
        if name not in known:
            raise ValueError(f"unknown condition {name!r}{closest(name, known)}")
        specs = [specs[name] for specs in buckets.values() if name in specs]
        array = _as_dtype(np.asarray(value), specs[0].dtype if specs else np.dtype(np.float32))
        right_shape = not specs or any(array.shape[1:] == spec.shape[1:] for spec in specs)
        right_dtype = array.dtype == (specs[0].dtype if specs else np.float32)
        if array.ndim == 0 or not right_shape or not right_dtype:
            found = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"conditions[{name!r}] is {found}; expected {described(recipe, name)}")
        arrays[name] = array
    shapes = {name: array.shape[1:] for name, array in arrays.items()}
    if not any(
        all(shape == specs[n].shape[1:] for n, shape in shapes.items() if n in specs) for specs in buckets.values()
    ):
        raise ValueError(
            f"no bucket holds conditions of the shapes {shapes}; take all from one of {', '.join(buckets)}"
        )
    recipe.inputs.check_batch(arrays)
    return arrays


def same_length(counts: Mapping[str, int]) -> int:
    """N, of which there is one and it is not zero."""
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first]:
            raise ValueError(f"{first} has length {counts[first]} and {name} has {count}; give as many of each")
    if not counts[first]:
        raise ValueError(f"{first} is empty; give at least one")
    return counts[first]


def _as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Integers as other integers where every value fits, floats as other floats; all else as it is."""
    for kind in (np.integer, np.floating):
        if jnp.issubdtype(array.dtype, kind) and jnp.issubdtype(dtype, kind):
            other = array.astype(dtype)
            return other if kind is np.floating or (other == array).all() else array
    return array


def described(recipe: Recipe, name: str) -> str:
    """What a condition must be: "label int32 [N]", with the shapes of all buckets."""
    specs = [specs[name] for specs in recipe.batch_specs().values() if name in specs]
    shapes = dict.fromkeys(f"[{', '.join(('N', *map(str, spec.shape[1:])))}]" for spec in specs)
    return f"{name} {np.dtype(specs[0].dtype)} {' or '.join(shapes)}" if specs else f"{name} float32 [N, ...]"


def chosen_options(default: Any, changes: Mapping[str, Any]) -> Any:
    """The options of a recipe's `generate` with some of them changed: a new instance of the dataclass of `default`.

    Raises:
        ConfigError: an option is unknown, with the closest match; of another type; not finite; or refused by the class.
    """
    hints = get_type_hints(type(default))
    names = [field.name for field in dataclasses.fields(default)]
    what = "option of this run's generator"
    values = {}
    for name, value in changes.items():
        if name not in names:
            known = closest(name, names) if names else "; it has none"
            raise ConfigError(f"unknown option {name!r} of this run's generator{known}")
        try:
            value = coerce(value.item() if isinstance(value, np.generic) else value, hints[name], name, what)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if not all(math.isfinite(x) for x in jax.tree.leaves(value) if isinstance(x, float)):
            raise ConfigError(f"{what} {name!r} is {value}; give a finite number")
        values[name] = value
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:
        raise ConfigError(str(error)) from error
