"""Dataclasses out of plain values: each checked against the annotation of its field, each name against the fields."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """An instance of the dataclass `cls` from a nested dict, where a section may start from a `preset` of its class.

    Args:
        cls: a dataclass; the fields that are dataclasses themselves are built in the same way.
        values: by field; a missing one has its default.
        path: what the errors put before a field's name.

    Raises:
        ValueError: an unknown key, with the closest match; a value of another type; one that the class refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    values = dict(values)
    preset = values.pop("preset", None) if "preset" not in fields else None
    if preset is not None:
        if not hasattr(cls, "preset"):
            raise ValueError(f"config section {path or 'top level'!r} has no presets")
        try:
            base = cls.preset(preset)
        except ValueError as error:
            raise ValueError(f"config key {path}.preset: {error}") from error
    else:
        base = None
    arguments = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if name not in fields:
            raise ValueError(f"unknown config key {where!r}{closest(name, fields)}")
        arguments[name] = coerce(value, hints[name], where)
    try:
        return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config section {path or 'top level'!r}: {error}") from error


def coerce(value: Any, hint: Any, where: str, what: str = "config key") -> Any:
    """`value` as the annotated type: an int where a float is wanted becomes one, a list becomes a tuple.

    Raises:
        ValueError: it is of another type; the message begins with `what` it is and `where`.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)  # type: ignore[arg-type]
    if (members := kinds(hint)) and isinstance(value, Mapping):
        return _build_kind(members, value, where, what)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return coerce(value, option, where, what)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in options:
            return value
        raise ValueError(f"{what} {where!r} is {value!r}; choose one of {', '.join(map(repr, options))}")
    elif origin is Sequence and isinstance(value, list | tuple):
        return tuple(coerce(v, options[0], where, what) for v in value)
    elif origin is tuple and isinstance(value, list | tuple):
        if len(options) == 2 and options[1] is Ellipsis:
            return tuple(coerce(v, options[0], where, what) for v in value)
        if len(options) == len(value):
            return tuple(coerce(v, o, where, what) for v, o in zip(value, options, strict=True))
    elif origin is not None and isinstance(value, Mapping) and issubclass(origin, Mapping):
        return {k: coerce(v, options[1], f"{where}.{k}", what) for k, v in value.items()}
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(hint, type) and hint is not float and isinstance(value, hint):
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{what} {where!r} is {value!r} ({type(value).__name__}); expected {name}")


def _build_kind(members: Mapping[str, type], value: Mapping[str, Any], where: str, what: str) -> Any:
    """The dataclass of a union that a section's `kind` names; without a `kind`, the first that takes its keys."""
    if "kind" in value:
        if value["kind"] not in members:
            raise ValueError(f"{what} {f'{where}.kind'!r} is {value['kind']!r}{closest(str(value['kind']), members)}")
        return build(members[value["kind"]], value, where)
    errors = {}
    for kind, cls in members.items():
        try:
            return build(cls, value, where)
        except ValueError as error:
            errors[kind] = error
    found = "; ".join(f"{kind!r} refuses it: {error}" for kind, error in errors.items())
    raise ValueError(f"{what} {where!r} names no kind and fits none; add one. {found}")


def kinds(hint: Any) -> dict[str, type]:
    """`{kind: dataclass}` of an annotation that is a union of dataclasses told apart by a field `kind`; else `{}`.

    `None` may be among the options of the union.
    """
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return {}
    members: dict[str, type] = {}
    for option in typing.get_args(hint):
        if option is type(None):
            continue
        names = typing.get_args(typing.get_type_hints(option).get("kind")) if dataclasses.is_dataclass(option) else ()
        if not names:
            return {}
        members |= dict.fromkeys(names, option)
    return members


def closest(name: str, known: Any) -> str:
    """The end of an error about an unknown name: what it may have meant, or all there are."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(sorted(known))}"
