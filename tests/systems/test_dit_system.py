"""DiT draws what diffusers draws, and guides the three channels that the original guides."""

import pathlib

import numpy as np
import pytest

from snapgen_jax import cli
from snapgen_jax.config import complete
from snapgen_jax.generation import load_system
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.systems.dit import DiTSystem, DiTSystemConfig
from snapgen_jax.training.exits import ConfigError
from tests.parity import GOLDENS

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = GOLDENS / "pipeline_dit"


def tiny(**changes):
    values = {"system": "dit", "size": "any", "image_size": (16, 16), "steps": 9, "dtype": "float32"}
    return complete({**values, "frequency_shift": 1, **changes})


def pixels(config, place, noise, prompt="7"):
    return np.clip(load_system(config, place).run([prompt], noise=noise)["pixels"] / 2 + 0.5, 0, 1)


@pytest.mark.parametrize(("channels", "image"), [(3, "three"), (0, "four")])
def test_a_class_becomes_the_image_of_the_reference(channels, image):
    golden = np.load(FOLDER / "images.npz")
    made = pixels(tiny(guided_channels=channels), FOLDER, golden["noise"])
    assert np.abs(made - golden[image]).max() <= 1e-3
    assert np.abs(golden["three"] - golden["four"]).max() > 1e-2


@pytest.mark.oracle
def test_a_live_pipeline_of_diffusers_draws_alike(tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import dit_pipeline as oracle

    expected = oracle.run(oracle.make(tmp_path, seed=20), 3, 4)
    assert np.abs(pixels(tiny(guided_channels=0), tmp_path, oracle.noise(), "3") - expected).max() <= 1e-3


def test_a_prompt_is_a_number_or_a_name_of_a_class():
    system = load_system(tiny(), FOLDER).system
    prompts = ["7", "cock", "Tinca tinca", " tench ", ""]
    assert system.tokens(prompts, {})["labels"].tolist() == [7, 7, 0, 0, 10]
    for prompt, match in (
        ("10", "a number from 0 to 9"),
        ("goldfis", "did you mean 'goldfish'"),
        ("-1", "is no class"),
    ):
        with pytest.raises(ValueError, match=match):
            system.tokens([prompt], {})


def test_the_command_of_the_config_draws_with_a_folder(tmp_path, capsys):
    out = tmp_path / "cock.png"
    config = f"{ROOT}/configs/teacher/dit_xl2.py:runlocal"
    arguments = ["sample", f"--config={config}", f"--weights={FOLDER}", f"--out={out}"]
    assert cli.main([*arguments, "--prompt=cock"]) == 0
    assert "1 image of 16 x 16 px" in capsys.readouterr().out
    assert cli.main([*arguments, "--prompt=hen"]) == 78
    assert "is no class" in capsys.readouterr().err


def test_another_size_is_refused_and_the_published_one_counts_as_published():
    with pytest.raises(ConfigError, match="not DiT-XL/2"):
        load_system(tiny(size="xl_2"), FOLDER)
    counts = {name: count_parameters(spec) for name, spec in DiTSystem(DiTSystemConfig()).specs.items()}
    assert counts == {"transformer": 673_681_568, "labels": 1_153_152, "autoencoder": 83_653_863}
