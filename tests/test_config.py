"""Configs: completed with our defaults, overridden, checked, and refused with the closest match."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
from typing import Literal

import pytest

import snapgen_jax
from snapgen_jax import config as configs
from snapgen_jax import overrides, typed
from snapgen_jax.config_file import read
from snapgen_jax.recipes.flow_matching import FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError

QUICKSTART = "configs/shapes/quickstart.py"


def test_a_config_is_completed_with_the_defaults_of_the_dataclasses():
    config = configs.load_config(QUICKSTART)
    assert config.data.source == "shapes"
    assert config.optimizer.b1 == 0.9 and config.mesh.fsdp == 1
    built = configs.build(FlowMatchingConfig, config)
    assert built.network.latent_channels == 48 and built.optimizer.learning_rate == config.optimizer.learning_rate


def test_overrides_apply_after_completion_and_reach_any_key():
    changed = [
        "optimizer.learning_rate=1e-5",
        "network.qk_norm=False",
        "train_steps=7",
        "evaluation.final=('sample_grid',)",
    ]
    config = configs.load_config(QUICKSTART, changed)
    assert config.optimizer.learning_rate == 1e-5 and config.network.qk_norm is False and config.train_steps == 7
    assert config.evaluation.final == ("sample_grid",)


def test_a_preset_decides_the_defaults_of_its_section():
    config = configs.load_config("configs/folder.py", ["network.preset=smoke", "network.groups=2"])
    assert config.network.channels == (8, 16) and config.network.groups == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimiser.learning_rate=1",
            r"unknown config key 'optimiser' of recipe 'flow_matching'; did you mean 'optimizer'\?",
        ),
        ("optimizer.learning_rat=1", r"unknown config key 'optimizer.learning_rat'; did you mean 'learning_rate'\?"),
        ("train_steps=many", r"'train_steps' is 'many' \(str\); expected int"),
        ("train_steps=True", r"expected int"),
        ("optimizer.schedule=cosin", r"'optimizer.schedule' is 'cosin'; choose one of 'constant', 'cosine', 'linear'"),
        ("network.preset=huge", r"network.preset: UNetConfig has no preset 'huge'; the presets are smoke"),
        ("inputs.codec.workdir=ae", r"'inputs.codec': workdir is not read under this kind; set kind='autoencoder', or"),
        (
            "inputs.codec={'kind': 'autoencoder', 'decoder_workdir': 'tiny'}",
            r"decoder_workdir is not read under this decoder; set decoder='tiny', or leave decoder_workdir out",
        ),
        ("recipe=autoencoder", r"unknown config key '\w+' of recipe 'autoencoder'; known: autoencoder, batch_size"),
        ("recipe=flowmatching", r"unknown recipe 'flowmatching'; did you mean 'flow_matching'\?"),
        ("train_steps", r"override 'train_steps' has no value"),
        ("network.groups=7", r"config section 'network': .*multiple of groups=7"),
        ("network.groops=7", r"unknown config key 'network.groops'; did you mean 'groups'\?"),
        (
            "network.kind=unett",
            r"'network.kind' is 'unett'; choose one of 'unet', 'mmdit', 'dit', 'sd_unet'; did you mean 'unet'\?",
        ),
        ("network={'groups': 7}", r"config section 'network': UNetConfig: .*multiple of groups=7"),
        ("seed.x=1", r"'seed' is a value, not a section|expected int"),
    ],
)
def test_a_wrong_override_is_refused_with_what_to_change(override, message):
    with pytest.raises(ConfigError, match=message):
        configs.load_config(QUICKSTART, [override])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path=2024_05", "2024_05"),
        ("data.path=1e5", "1e5"),
        ("data.path=007", "007"),
        ("data.path=None", "None"),
        ("data.path=(1,2)", "(1,2)"),
        ("data.path=", ""),
        ("data.path='2024'", "2024"),
        ("data.path=a=b", "a=b"),
        ("init_from=12", "12"),
        ("seed=1_000", 1000),
        ("seed=0x10", 16),
        ("optimizer.learning_rate=1", 1.0),
        ("inputs.image_sizes=((32,32),)", ((32, 32),)),
        ("inputs.image_sizes=[[32, 32], [24, 40]]", ((32, 32), (24, 40))),
        ("evaluation.final=('sample_grid', '2024_05')", ("sample_grid", "2024_05")),
        ("data.bucket_shares={'32x32': 3}", {"32x32": 3.0}),
        ("data.bucket_shares.32x32=3", {"32x32": 3.0}),
        ("data.texts={'tokens': '7'}", {"tokens": "7"}),
        ("data.texts.tokens=7", {"tokens": "7"}),
        ("data.crop=centre", "centre"),
        ("data.crop='centre'", "centre"),
    ],
)
def test_an_override_is_read_as_what_its_field_is(override, expected):
    config = configs.load_config("configs/folder.py:runlocal", [override])
    value = config
    for name in override.partition("=")[0].removesuffix(".32x32").removesuffix(".tokens").split("."):
        value = value[name]
    value = value.to_dict() if hasattr(value, "to_dict") else value
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "override", ["seed=1e3", "seed='7'", "seed=None", "data.crop=7", "evaluation.final=sample_grid"]
)
def test_an_override_of_another_type_is_refused(override):
    with pytest.raises(ConfigError, match=r"expected|choose one of"):
        configs.load_config("configs/folder.py:runlocal", [override])


def test_home_is_put_in_place_of_its_sign_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.py"
    file.write_text(
        "def get_config(arg=None):\n"
        "    return {'data': {'source': 'folder', 'path': '~/photos', 'class_names': 'kept~/as/it/is'},\n"
        "            'inputs': {'text_workdir': '~/clip'}}\n"
    )
    config = configs.load_config(str(file))
    assert config.inputs.text_workdir == f"{tmp_path}/clip"
    assert config.data.path == f"{tmp_path}/photos" and config.data.class_names == "kept~/as/it/is"
    config = configs.load_config(str(file), ["init_from=~/earlier", "data.path='~/others'", "data.tokenizer=~"])
    paths = config.init_from, config.data.path, config.data.tokenizer
    assert paths == (f"{tmp_path}/earlier", f"{tmp_path}/others", str(tmp_path))
    teacher = configs.load_config("configs/distill/t2i_1024_sd35l.py:runlocal", ["teacher.workdir=~/teacher"])
    assert teacher.teacher.workdir == f"{tmp_path}/teacher"


def test_a_missing_file_and_a_file_without_get_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        configs.load_config("configs/nowhere.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no get_config"):
        configs.load_config(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def get_config(arg=None):\n    return 1 +\n",
            r"slip.py:2: SyntaxError: invalid syntax.*; correct the config",
        ),
        ("def get_config(arg=None):\n    return c.x\n", r"slip.py:2: NameError: name 'c' is not defined; correct"),
        (
            "from ml_collections import ConfigDict\ndef get_config(arg=None):\n    return ConfigDict({}).inputs.kind\n",
            r"slip.py:3: AttributeError: .*'inputs'",
        ),
        ("def get_config():\n    return {}\n", r"must take one argument, `def get_config\(arg=None\)`"),
        ("def get_config(arg=None):\n    return {'one': {}}['x']\n", r"slip.py:2: KeyError: 'x'; correct"),
        ("def get_config(arg=None):\n    pass\n", r"get_config\(''\) returned None; return a ConfigDict, or a dict"),
    ],
)
def test_a_slip_in_a_config_file_is_named_with_its_line(text, message, tmp_path):
    (tmp_path / "slip.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        configs.load_config(str(tmp_path / "slip.py"))


def test_an_unknown_argument_of_get_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown argument 'runlocl'"):
        configs.load_config(QUICKSTART + ":runlocl")
    (tmp_path / "table.py").write_text("def get_config(arg=None):\n    return {None: {}, 'one': {}}[arg]\n")
    with pytest.raises(ConfigError, match=r"table.py: get_config knows no argument 'two'; the top of the file says"):
        configs.load_config(f"{tmp_path / 'table.py'}:two")


def test_json_restores_the_very_config():
    config = configs.load_config(QUICKSTART)
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()


def test_the_json_of_another_version_is_refused_with_what_to_do():
    text = configs.to_json(configs.load_config(QUICKSTART))
    assert text.startswith('{\n  "schema": 2,\n')
    values = json.loads(text)
    with pytest.raises(ConfigError, match="an earlier version; rewrite it once with `snapgen upgrade runs/old`"):
        configs.from_json(json.dumps({k: v for k, v in values.items() if k != "schema"}), "runs/old")
    with pytest.raises(ConfigError, match="runs/new was written by a later version: its config has schema 3"):
        configs.from_json(json.dumps({**values, "schema": 3}), "runs/new")


def test_an_experiment_is_resolved_to_the_dataclasses_that_its_config_fills():
    resolved = configs.load_experiment(QUICKSTART, ["train_steps=7", "network.groups=8"])
    assert resolved.config.to_dict() == configs.load_config(QUICKSTART, ["train_steps=7", "network.groups=8"]).to_dict()
    assert resolved.experiment == configs.build(configs.ExperimentConfig, resolved.config)
    assert resolved.experiment.train_steps == 7 and resolved.recipe.network.groups == 8
    assert resolved.recipe_class is configs.recipe_class("flow_matching")
    again = configs.resolve(resolved.config)
    assert (again.experiment, again.recipe) == (resolved.experiment, resolved.recipe)
    with pytest.raises(ConfigError, match=r"configs/teacher/sd35_large\.py describes a published system"):
        configs.load_experiment("configs/teacher/sd35_large.py")


@pytest.fixture
def two_checkouts(tmp_path):
    """Two folders `configs/` whose files build on one of their own that has the same name in both."""
    for name, steps in (("one", 1), ("two", 2)):
        folder = tmp_path / name / "configs" / "shapes"
        folder.mkdir(parents=True)
        (folder / "base.py").write_text(f"def get_config(arg=None):\n    return {{'train_steps': {steps}}}\n")
        (folder / "run.py").write_text(
            "from configs.shapes import base\n\n\n"
            "def get_config(arg=None):\n"
            "    from configs.shapes.base import get_config\n\n"  # while get_config runs, too
            "    return {**base.get_config(), 'seed': get_config()['train_steps']}\n"
        )
    return tmp_path


def test_a_config_builds_on_the_files_of_its_own_configs_folder(two_checkouts, monkeypatch):
    monkeypatch.chdir(two_checkouts / "one")
    path, modules = list(sys.path), set(sys.modules)
    for name, steps in (("one", 1), ("two", 2), ("one", 1)):
        assert read(f"{two_checkouts}/{name}/configs/shapes/run.py") == {"train_steps": steps, "seed": steps}
    assert read("../two/configs/shapes/run.py")["train_steps"] == 2
    assert sys.path == path and set(sys.modules) == modules


def test_another_package_called_configs_is_neither_used_nor_lost(two_checkouts, monkeypatch):
    other, shapes = types.ModuleType("configs"), types.ModuleType("configs.shapes")
    other.__dict__.update(__path__=[], shapes=shapes)
    monkeypatch.setitem(sys.modules, "configs", other)
    monkeypatch.setitem(sys.modules, "configs.shapes", shapes)
    assert read(f"{two_checkouts}/two/configs/shapes/run.py")["train_steps"] == 2
    assert sys.modules["configs"] is other and sys.modules["configs.shapes"] is shapes
    (two_checkouts / "two" / "configs" / "shapes" / "run.py").write_text("from configs.shapes import basis\n")
    with pytest.raises(ConfigError, match=r"cannot import name 'basis'.* other files of its `configs/` folder"):
        read(f"{two_checkouts}/two/configs/shapes/run.py")
    assert sys.modules["configs"] is other and sys.modules["configs.shapes"] is shapes


def test_an_edit_of_a_file_that_another_builds_on_counts_at_once(two_checkouts):
    run, base = (two_checkouts / "one" / "configs" / "shapes" / name for name in ("run.py", "base.py"))
    for steps in (3, 4, 5):  # within a second, and as long as before
        base.write_text(f"def get_config(arg=None):\n    return {{'train_steps': {steps}}}\n")
        assert read(str(run))["train_steps"] == steps
    assert not list(two_checkouts.rglob("*.pyc"))


def test_a_config_loads_from_anywhere_with_a_package_that_has_no_configs_beside_it(tmp_path):
    package = pathlib.Path(snapgen_jax.__file__).parent
    shutil.copytree(package, tmp_path / "installed" / "snapgen_jax", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "elsewhere").mkdir()
    file = pathlib.Path("configs/distill/t2i_1024_sd35l.py").absolute()
    script = (
        "import snapgen_jax; from snapgen_jax.config import load_config; "
        f"print(snapgen_jax.__file__, load_config({f'{file}:runlocal'!r}).recipe)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [f"{tmp_path}/installed/snapgen_jax/__init__.py", "distillation"], done.stderr


@dataclasses.dataclass(frozen=True)
class Round:
    """A network of one kind, which holds one of several kinds itself."""

    kind: Literal["round"] = "round"
    radius: int = 1
    inner: "Round | Square | None" = None

    @classmethod
    def preset(cls, name: str) -> "Round":
        return {"large": cls(radius=100)}[name]


@dataclasses.dataclass(frozen=True)
class Square:
    """A network of another kind."""

    kind: Literal["square"] = "square"
    side: int = 2
    inner: Round | None = None

    @classmethod
    def preset(cls, name: str) -> "Square":
        return {"large": cls(side=200)}[name]


@dataclasses.dataclass(frozen=True)
class Plain:
    """A section whose `kind` is a value like any other."""

    kind: Literal["identity", "patch"] = "identity"
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
    """A config."""

    network: Round | Square = Square()
    codec: Plain = Plain()
    teacher: Square = Square()


@pytest.mark.parametrize(
    ("partial", "given", "expected"),
    [
        ({"network": {"kind": "round", "radius": 7}}, ["network.kind=square"], Whole(Square())),
        ({"network": {"kind": "round", "radius": 7}}, ['network={"kind": "square"}'], Whole(Square())),
        (
            {"network": {"kind": "round", "preset": "large", "inner": {"kind": "square", "side": 3}}},
            ["network.side=5", "network.preset=large", "network.kind=square"],
            Whole(Square(side=5)),
        ),
        (
            {"network": {"kind": "round"}},
            ["network.inner.side=4", "network.inner.kind=square"],
            Whole(Round(inner=Square(side=4))),
        ),
        (
            {"network": {"kind": "round", "inner": {"kind": "square", "side": 3}}},
            ["network.inner.kind=round", "network.kind=square", "network.inner.radius=9"],
            Whole(Square(inner=Round(radius=9))),
        ),
        ({}, ["network.kind=round", "network.radius=6"], Whole(Round(radius=6))),
        ({"network": {"kind": "square"}}, ["network.inner.kind=round"], Whole(Square(inner=Round()))),
        ({"teacher": {"inner": {"radius": 8}}}, ["teacher.inner.kind=round"], Whole(teacher=Square(inner=Round()))),
        ({"codec": {"kind": "identity", "scale": 3.0}}, ["codec.kind=patch"], Whole(codec=Plain("patch", 3.0))),
        (
            {"network": {"kind": "round", "radius": 7}},
            ["network.inner.kind=round"],
            Whole(Round(radius=7, inner=Round())),
        ),
    ],
)
def test_an_override_of_kind_replaces_the_section_where_kinds_are_dataclasses(partial, given, expected):
    wanted = json.loads(json.dumps(partial))
    overrides.apply(wanted, [overrides.parse_override(text) for text in given], [Whole])
    assert typed.build(Whole, wanted) == expected


def test_kinds_are_those_of_a_union_of_dataclasses():
    assert overrides.kinds(Round | Square | None) == {"round": Round, "square": Square}
    assert overrides.kinds(Plain) == overrides.kinds(int | None) == overrides.kinds(Round | str) == {}


@pytest.mark.parametrize("path", sorted(str(p) for p in pathlib.Path("configs").rglob("*.py")))
def test_every_config_file_completes_in_both_sizes_and_says_how_to_run_it(path):
    for spec in (path, path + ":runlocal"):
        if spec == "configs/full_path.py":
            continue  # its full size is the commands of docs/pods.md
        if "stages" in read(spec):
            continue  # a chain names configs that are files of their own
        config = configs.load_config(spec)
        if "system" in config:
            configs.build(configs.system_class(config.system).Config, config)
        else:
            cls = configs.recipe_class(config.recipe)
            cls(configs.build(cls.Config, config), "cpu").batch_specs()
    text = pathlib.Path(path).read_text()
    assert "snapgen " in text.split('"""')[1] and "Machine:" in text.split('"""')[1]
    assert not re.search(r"^\s*(from|import) snapgen_jax", text, re.MULTILINE)
