"""Plain values become dataclasses; of a union of them `kind` chooses, and an error names the field."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import ClassVar, Literal

import pytest

from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Preset
from snapgen_jax.networks.registry import CONFIGS, DenoiserConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.typed import Written, build, coerce, expand_home, plain


@dataclasses.dataclass(frozen=True)
class Round:
    kind: Literal["round"] = "round"
    radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Square(Preset):
    kind: Literal["square"] = "square"
    side: int = 1
    inner: Round | Square | None = None

    PRESETS: ClassVar = {"large": {"side": 10, "inner": Round(radius=3.0)}}


@dataclasses.dataclass(frozen=True)
class Unkinded:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    shape: Round | Square = Square()
    first: Round | Square = dataclasses.field(kw_only=True, default_factory=Round)
    maybe: Square | Round | None = None
    many: tuple[Round | Square, ...] = ()
    named: Mapping[str, Round | Square] = dataclasses.field(default_factory=dict)
    simple: Unkinded | None = None


@dataclasses.dataclass(frozen=True)
class Required:
    shape: Round | Square


@dataclasses.dataclass(frozen=True)
class Networks:
    network: DenoiserConfig = UNetConfig.preset("smoke")
    teacher: DenoiserConfig | None = None


KINDS = ", ".join(repr(member.preset("smoke").kind) for member in typing.get_args(DenoiserConfig))


def test_the_kind_chooses_the_member_whatever_stands_first():
    config = build(Config, {"shape": {"kind": "round", "radius": 2}, "first": {"kind": "square", "side": 3}})
    assert config.shape == Round(radius=2.0) and config.first == Square(side=3)


def test_without_a_kind_the_default_value_decides_and_without_one_the_first_member():
    config = build(Config, {"shape": {"side": 2}, "first": {"radius": 2.0}, "maybe": {"side": 5}})
    assert config.shape == Square(side=2) and config.first == Round(radius=2.0) and config.maybe == Square(side=5)
    assert build(Required, {"shape": {"radius": 4.0}}) == Required(Round(radius=4.0))


def test_a_preset_works_inside_a_union_and_decides_for_the_fields_below():
    config = build(Config, {"maybe": {"kind": "square", "preset": "large", "inner": {"radius": 4.0}}})
    assert config.maybe == Square(side=10, inner=Round(radius=4.0))
    networks = build(Networks, {"teacher": {"kind": "mmdit", "preset": "smoke", "depth": 5}})
    assert networks == Networks(teacher=MMDiTConfig.preset("smoke", depth=5))


def test_optional_fields_sequences_and_mappings_of_unions():
    config = build(
        Config,
        {
            "maybe": None,
            "many": [{"kind": "square"}, {"radius": 2.0}],
            "named": {"a": {"kind": "square", "side": 2}},
            "simple": {"size": 3},
        },
    )
    assert config.maybe is None and config.many == (Square(), Round(radius=2.0))
    assert config.named == {"a": Square(side=2)} and config.simple == Unkinded(3)


def test_an_instance_is_taken_as_it_is():
    config = build(Config, {"shape": Round(radius=7.0), "many": (Square(side=2), {"kind": "round"})})
    assert config.shape == Round(radius=7.0) and config.many == (Square(side=2), Round())
    with pytest.raises(ValueError, match="config key 'shape' is Unkinded"):
        build(Config, {"shape": Unkinded()})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"network": {"kind": "mmdit", "depht": 3}},
            "unknown config key 'network.depht'; did you mean 'depth'?",
        ),
        (
            {"network": {"kind": "unett"}},
            f"config key 'network.kind' is 'unett'; choose one of {KINDS}; did you mean 'unet'?",
        ),
        ({"network": {"kind": 3}}, f"config key 'network.kind' is 3; choose one of {KINDS}"),
        ({"teacher": {"kind": "mmdit", "depth": "deep"}}, "'teacher.depth' is 'deep' (str); expected int"),
        ({"teacher": {"kind": "mmdit", "preset": "huge"}}, "config key teacher.preset: MMDiTConfig has no preset"),
        ({"network": {"kind": "mmdit", "depth": 2, "dual": 2}}, "config section 'network': MMDiTConfig: dual=2"),
        ({"network": "unet"}, "config key 'network' is 'unet' (str)"),
    ],
)
def test_an_error_names_the_field_of_the_chosen_kind(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(Networks, values)


def test_an_optional_section_of_one_class_names_its_field_too():
    with pytest.raises(ValueError, match=re.escape("unknown config key 'simple.siez'; did you mean 'size'?")):
        build(Config, {"simple": {"siez": 1}})


@pytest.mark.parametrize("config", [Config(), Config(maybe=Square(inner=Round()), many=(Square(), Round()))])
def test_plain_values_build_the_very_config_and_name_the_kind(config):
    values = plain(config)
    assert values["shape"]["kind"] == config.shape.kind
    assert all(isinstance(item, dict) for item in values["many"])
    assert build(Config, values) == config


def test_the_kind_of_a_network_stands_first_and_is_its_own():
    kinds = []
    for cls in CONFIGS:
        first = dataclasses.fields(cls)[0]
        assert first.name == "kind", cls
        kinds.append(first.default)
    assert len(set(kinds)) == len(kinds)


# --- what stands on a command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "hint", "expected"),
    [
        ("12", str, "12"),
        ("12", int, 12),
        ("12", float, 12.0),
        ("12", str | None, "12"),
        ("None", str | None, None),
        ("12", int | str, 12),
        ("twelve", int | str, "twelve"),
        ("12", Literal["12", "13"], "12"),
        ("12", Literal[12, 13], 12),
        ("(1, 2)", tuple[int, ...], (1, 2)),
        ("{'a': 1}", Mapping[str, float], {"a": 1.0}),
        ("{'side': 3}", Square | None, Square(side=3)),
        ("{'side': 3}", str, "{'side': 3}"),
    ],
)
def test_what_is_written_is_read_as_what_is_wanted(written, hint, expected):
    value = coerce(Written(written), hint, "field")
    assert value == expected and type(value) is type(expected)


def test_home_is_the_beginning_of_a_path_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ("~", "~/a", "~nobody-of-that-name/a", "a~/b", "~ 5 cats", "gs://bucket/~/a", "")
    expected = ("/home/me", "/home/me/a", "~nobody-of-that-name/a", "a~/b", "~ 5 cats", "gs://bucket/~/a", "")
    assert tuple(map(expand_home, paths)) == expected
