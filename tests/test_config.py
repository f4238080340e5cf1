"""Configs: completed with our defaults, overridden, checked, and refused with the closest match."""

import pathlib

import pytest

from snapgen_jax import config as configs
from snapgen_jax.recipes.flow_matching import FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError

QUICKSTART = "configs/shapes/quickstart.py"


def test_a_config_is_completed_with_the_defaults_of_the_dataclasses():
    config = configs.load_config(QUICKSTART)
    assert config.data.source == "shapes"
    assert config.optimizer.b1 == 0.9 and config.mesh.fsdp == 1
    built = configs.build(FlowMatchingConfig, config)
    assert built.unet.latent_channels == 48 and built.optimizer.learning_rate == config.optimizer.learning_rate


def test_overrides_apply_after_completion_and_reach_any_key():
    changed = [
        "optimizer.learning_rate=1e-5",
        "unet.qk_norm=False",
        "train_steps=7",
        "evaluation.final=('sample_grid',)",
    ]
    config = configs.load_config(QUICKSTART, changed)
    assert config.optimizer.learning_rate == 1e-5 and config.unet.qk_norm is False and config.train_steps == 7
    assert config.evaluation.final == ("sample_grid",)


def test_a_preset_decides_the_defaults_of_its_section():
    config = configs.load_config("configs/folder.py", ["unet.preset=smoke", "unet.groups=2"])
    assert config.unet.channels == (8, 16) and config.unet.groups == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.learning_rate=1", r"unknown config key 'optimiser'; did you mean 'optimizer'\?"),
        ("optimizer.learning_rat=1", r"unknown config key 'optimizer.learning_rat'; did you mean 'learning_rate'\?"),
        ("train_steps=many", r"'train_steps' is 'many' \(str\); expected int"),
        ("train_steps=True", r"expected int"),
        ("optimizer.schedule=cosin", r"'optimizer.schedule' is 'cosin'; choose one of 'constant', 'cosine', 'linear'"),
        ("unet.preset=huge", r"unet.preset: UNetConfig has no preset 'huge'; the presets are smoke"),
        ("recipe=flowmatching", r"unknown recipe 'flowmatching'; did you mean 'flow_matching'\?"),
        ("train_steps", r"override 'train_steps' has no value"),
        ("unet.groups=7", r"config section 'unet': .*multiple of groups=7"),
        ("seed.x=1", r"'seed' is a value, not a section|expected int"),
    ],
)
def test_a_wrong_override_is_refused_with_what_to_change(override, message):
    with pytest.raises(ConfigError, match=message):
        configs.load_config(QUICKSTART, [override])


def test_a_missing_file_and_a_file_without_get_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        configs.load_config("configs/nowhere.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no get_config"):
        configs.load_config(str(tmp_path / "empty.py"))


def test_an_unknown_argument_of_get_config_is_refused():
    with pytest.raises(ConfigError, match="unknown argument 'runlocl'"):
        configs.load_config(QUICKSTART + ":runlocl")


def test_json_restores_the_very_config():
    config = configs.load_config(QUICKSTART)
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize("path", sorted(str(p) for p in pathlib.Path("configs").rglob("*.py")))
def test_every_config_file_completes_in_both_sizes_and_says_how_to_run_it(path):
    for spec in (path, path + ":runlocal"):
        if "stages" in configs.read(spec):
            continue  # a chain names configs that are files of their own
        config = configs.load_config(spec)
        if "system" in config:
            configs.build(configs.system_class(config.system).Config, config)
        else:
            cls = configs.recipe_class(config.recipe)
            cls(configs.build(cls.Config, config), "cpu").batch_specs()
    text = pathlib.Path(path).read_text()
    assert "snapgen " in text.split('"""')[1] and "Machine:" in text.split('"""')[1]
    assert "snapgen_jax" not in text.split('"""', 2)[2]
