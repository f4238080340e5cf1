"""Changes of a config from the command line: "a.b=value", each applied to what the config file says.

A section whose field is a union of dataclasses is told by its `kind`. An override of that `kind` replaces the whole
section: what the file said of the old kind does not describe the new one. Values are read by the annotation of their
field, when the dataclasses are built.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from snapgen_jax.training.exits import ConfigError
from snapgen_jax.typed import Written

Change = tuple[list[str], Written]


def parse_override(text: str, flag: str = "--config.") -> Change:
    """The path and the value of "a.b=value", as it is written.

    Raises:
        ConfigError: there is no value; names the `flag` that it came with.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r} has no value; write {flag}{name}=VALUE")
    return name.split("."), Written(value)


def apply(wanted: dict[str, Any], changes: Sequence[Change], classes: Sequence[type]) -> None:
    """Applies changes to what a config file says, in place: kinds first, then presets, then all other values.

    A kind decides which keys its section has, a preset what their defaults are.

    Args:
        wanted: the file's values, nested dicts.
        changes: as from `parse_override`.
        classes: the dataclasses that receive the config's top-level keys.

    Raises:
        ConfigError: a change leads into a value that is not a section.
    """
    kinds = [change for change in changes if _may_name_kind(change)]
    others = [change for change in changes if not _may_name_kind(change)]
    for path, value in sorted(kinds, key=lambda change: len(_section(change))):
        section = _section((path, value))
        if not _members_at(classes, wanted, section):  # a plain field that is called kind, or takes a mapping
            others.append((path, value))
        else:
            mapping = _mapping(value)
            _put(wanted, section, {"kind": _text(value)} if mapping is None else mapping)
    for path, value in sorted(others, key=lambda change: change[0][-1] != "preset"):
        mapping = _mapping(value)
        _put(wanted, path, value if mapping is None else mapping)


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


def _may_name_kind(change: Change) -> bool:
    path, value = change
    return (len(path) > 1 and path[-1] == "kind") or "kind" in (_mapping(value) or {})


def _mapping(value: Any) -> dict[str, Any] | None:
    """A value that is a mapping, or is written as one; else None."""
    value = value.literal if isinstance(value, Written) else value
    return dict(value) if isinstance(value, Mapping) else None


def _text(value: Any) -> Any:
    """A name, where one is written."""
    return value.of(str) if isinstance(value, Written) else value


def _section(change: Change) -> list[str]:
    path, value = change
    return path[:-1] if _mapping(value) is None else path


def _members_at(classes: Sequence[type], wanted: Mapping[str, Any], section: Sequence[str]) -> dict[str, type]:
    """The kinds that a section may have, by the annotation of its field; `{}` where it is not a union, or not there."""
    fields = {field.name: (field, cls) for cls in classes for field in dataclasses.fields(cls)}
    node: Any = wanted
    members: dict[str, type] = {}
    for part in section:
        if part not in fields:
            return {}
        field, owner = fields[part]
        hint = typing.get_type_hints(owner)[part]
        node = node.get(part) if isinstance(node, Mapping) else None
        members = kinds(hint)
        kind = node.get("kind") if isinstance(node, Mapping) else None
        cls = members[kind] if kind in members else _default_class(field, hint)
        fields = {f.name: (f, cls) for f in dataclasses.fields(cls)} if cls is not None else {}
    return members


def _default_class(field: dataclasses.Field, hint: Any) -> type | None:
    """The dataclass that a field holds where the config does not say which."""
    make: Any = field.default_factory
    default = field.default if make is dataclasses.MISSING else make()
    if dataclasses.is_dataclass(default):
        return type(default)
    options = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
    return typing.cast(type, options[0]) if options else None


def _put(wanted: dict[str, Any], path: Sequence[str], value: Any) -> None:
    node = wanted
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"config key {'.'.join(path)!r}: {part!r} is a value, not a section")
    node[path[-1]] = value
