"""Dataclasses out of plain values, and back: each value checked against the annotation of its field.

A field may be a union of dataclasses, each with a field `kind: Literal["..."]` of its own. A mapping is the member that
its `kind` names. Without a `kind` it is of the kind of the field's default value; without a default, the first member.

What stands on a command line is `Written`, and becomes a value by the annotation of its field: `2024_05` is a name
where a string is wanted and a number where a number is.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from snapgen_jax.bounds import FieldError


class Written(str):
    """A value as it stands on a command line; `coerce` makes of it what the field wants."""

    @property
    def literal(self) -> Any:
        """The Python literal that it spells, or else the text itself."""
        # Half of a character cannot stand in the source of a literal, but its escape can.
        source = self.encode("utf-8", "backslashreplace").decode()
        try:
            return ast.literal_eval(source)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return str(self)

    def of(self, hint: Any) -> Any:
        """What it is where a value of this annotation is wanted: a literal, or text, which quotes may surround."""
        literal, origin, options = self.literal, typing.get_origin(hint), typing.get_args(hint)
        if isinstance(literal, str):
            return literal
        if hint is str or (origin is typing.Literal and literal not in options and str(self) in options):
            return str(self)
        if origin in (typing.Union, types.UnionType) and str in options:  # a number or None only where that is wanted
            try:
                coerce(literal, hint, "")
            except ValueError:
                return str(self)
        return literal


def expand_home(text: str) -> str:
    """The text, where it is a path that begins with "~/" or "~name/" with the home folder in its place."""
    return os.path.expanduser(text) if re.match(r"~[\w.-]*(/|$)", text) else text


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
        preset = coerce(preset, str, f"{path}.preset") if isinstance(preset, Written) else preset
        try:
            base = cls.preset(preset)
        except ValueError as error:
            raise ValueError(f"config key {path}.preset: {error}") from error
    else:
        base = None
    defaults = {field.name: _default(field) for field in dataclasses.fields(cls)} if base is None else vars(base)
    arguments = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else name
        if name not in fields:
            raise ValueError(f"unknown config key {where!r}{closest(name, fields)}")
        arguments[name] = coerce(value, hints[name], where, default=defaults[name])
    try:
        return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)
    except FieldError as error:
        where = f"{path}.{error.field}" if path else error.field
        raise ValueError(f"config key {where!r} {error.reason}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"config section {path or 'top level'!r}: {error}") from error


def plain(value: Any) -> Any:
    """The inverse of `build`: dataclasses as dicts, `kind` among the fields; also inside mappings and sequences."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    return value


def coerce(value: Any, hint: Any, where: str, what: str = "config key", default: Any = None) -> Any:
    """`value` as the annotated type: an int where a float is wanted becomes one, a list becomes a tuple.

    What is `Written` is read as that type. A string that begins with "~/" is a path from the home folder.

    `default` is what the field has where nothing is given; of a union of dataclasses it tells which one a mapping
    without `kind` is.

    Raises:
        ValueError: it is of another type; the message begins with `what` it is and `where`.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Written):
        value = value.of(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        member = _member(value, options, where, what, default) if isinstance(value, Mapping) else None
        if member is not None:
            return build(member, value, where)
        for option in options:
            try:
                return coerce(value, option, where, what)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in options:
            return value
        raise ValueError(
            f"{what} {where!r} is {value!r}; choose one of {', '.join(map(repr, options))}{_meant(value, options)}"
        )
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
    elif hint is str and isinstance(value, str):
        return expand_home(value)
    elif isinstance(hint, type) and hint is not float and isinstance(value, hint):
        return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{what} {where!r} is {value!r} ({type(value).__name__}); expected {name}")


def _member(value: Mapping[str, Any], options: Sequence[Any], where: str, what: str, default: Any) -> type | None:
    """The dataclass of a union that a mapping describes: the only one, or that of its kind; None where there is none.

    It is chosen before a field is read, so that an error about a field comes from the right dataclass.
    """
    members = [option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)]
    kinds = {kind: member for member in members for kind in _kinds(member)}
    if not kinds:
        return members[0] if len(members) == 1 else None
    kind = value.get("kind", getattr(default, "kind", next(iter(kinds))))
    if kind in kinds:
        return kinds[kind]
    raise ValueError(
        f"{what} {where + '.kind'!r} is {kind!r}; choose one of {', '.join(map(repr, kinds))}{_meant(kind, kinds)}"
    )


def _kinds(cls: type) -> tuple[str, ...]:
    """The values that the field `kind` of a dataclass may have, if it is there and a `Literal`."""
    if "kind" not in {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        return ()
    hint = typing.get_type_hints(cls)["kind"]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _default(field: dataclasses.Field) -> Any:
    """A field's default value; None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _meant(value: Any, options: Any) -> str:
    """Which of the options a value may have meant; "" where none is near."""
    match = difflib.get_close_matches(str(value), [str(option) for option in options], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def closest(name: str, known: Any) -> str:
    """The end of an error about an unknown name: what it may have meant, or all there are."""
    return _meant(name, known) or f"; known: {', '.join(sorted(known))}"
