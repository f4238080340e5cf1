"""Stable Diffusion 1.5, 2.1 and XL draw what diffusers draws, from the folders that diffusers reads."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from snapgen_jax import cli
from snapgen_jax.config import complete
from snapgen_jax.generation import load_system
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.systems.sd import SD, SDConfig, read_training
from snapgen_jax.training.exits import ConfigError
from tests.parity import GOLDENS

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = "a photo of two red circles left of a green star"
CASES = {"sd15": (10, 7.5), "sd21": (10, 5.0), "sdxl": (6, 5.0)}


def folder(name):
    return GOLDENS / f"pipeline_{name}"


def tiny(steps=4, guidance=1.0, **changes):
    values = {"system": "sd", "size": "any", "image_size": (48, 64), "steps": steps, "guidance": guidance}
    return complete({**values, "dtype": "float32", **changes})


def pixels(config, place, **options):
    return np.clip(load_system(config, place).run([PROMPT], **options)["pixels"] / 2 + 0.5, 0, 1)


@pytest.mark.parametrize("name", CASES)
def test_prompt_to_image_equals_the_pipeline_of_diffusers(name):
    golden = np.load(folder(name) / "images.npz")
    generator = load_system(tiny(*CASES[name]), folder(name))
    for image, negative in (("image", ""), ("negative", "blue squares")):
        made = generator.run([PROMPT], noise=golden["noise"], negative_prompt=negative)["pixels"]
        assert np.abs(np.clip(made / 2 + 0.5, 0, 1) - golden[image]).max() <= 1e-3, image
    assert golden["image"].std() > 0.05
    assert np.abs(golden["image"] - golden["negative"]).max() > 1e-2


def test_euler_over_sigma_is_the_same_sampler():
    golden = np.load(folder("sd15") / "images.npz")
    made = pixels(tiny(7, CASES["sd15"][1]), folder("sd15"), noise=golden["noise"])
    assert np.abs(made - golden["euler"]).max() <= 1e-3


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_live_pipelines_of_diffusers_draw_alike(name, tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import sd_pipeline as oracle

    expected = oracle.run(oracle.make(tmp_path, name, seed=20), name)
    assert np.abs(pixels(tiny(*CASES[name]), tmp_path, noise=oracle.noise()) - expected).max() <= 1e-3


def test_what_the_folder_says_of_its_training_is_read(tmp_path):
    assert read_training(folder("sd21")).prediction == "v"
    assert read_training(folder("sd15")).prediction == "eps"
    assert read_training(folder("sdxl")).empty_is_zero
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    for values, match in (
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "says no beta_schedule"),
        ({"beta_schedule": "scaled_linear", "prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"beta_schedule": "spiral"}, "unknown betas 'spiral'"),
    ):
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=match):
            read_training(tmp_path)
    file.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear"}))
    assert read_training(tmp_path).schedule.spacing == "linspace"


@pytest.mark.parametrize("name", CASES)
def test_the_command_of_the_config_draws_with_a_folder(name, tmp_path, capsys):
    out = tmp_path / "fox.png"
    config = f"{ROOT}/configs/teacher/{name}.py:runlocal"
    arguments = ["sample", f"--config={config}", f"--weights={folder(name)}", "--prompt=a red fox", f"--out={out}"]
    assert cli.main([*arguments, "--steps=2", "--config.image_size=(16,16)"]) == 0
    assert "1 image of 16 x 16 px" in capsys.readouterr().out
    assert out.stat().st_size > 100


def test_misuse_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"not sd15 \(channels"):
        load_system(tiny(size="sd15"), folder("sd15"))
    with pytest.raises(ConfigError, match="multiples of 8"):
        load_system(tiny(image_size=(50, 64)), folder("sd15"))
    with pytest.raises(ConfigError, match="between 1 and 1000 steps"):
        load_system(tiny(steps=1001), folder("sd15"))
    with pytest.raises(ConfigError, match="hf download stable-diffusion-v1-5"):
        load_system(tiny(), tmp_path)
    shutil.copytree(folder("sdxl"), tmp_path / "xl")
    shutil.rmtree(tmp_path / "xl" / "text_encoder_2")
    with pytest.raises(ConfigError, match="takes text states of width 24, and the text encoders make 8"):
        load_system(tiny(), tmp_path / "xl")


def test_files_in_float16_alone_are_read(tmp_path):
    place = tmp_path / "half"
    shutil.copytree(folder("sd15"), place)
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (place / part / f"{stem}.safetensors").rename(place / part / f"{stem}.fp16.safetensors")
    golden = np.load(folder("sd15") / "images.npz")
    made = pixels(tiny(*CASES["sd15"]), place, noise=golden["noise"])
    assert np.abs(made - golden["image"]).max() <= 1e-3


def test_the_published_sizes_count_as_published():
    counts = {
        size: {name: count_parameters(spec) for name, spec in SD(SDConfig(size=size)).specs.items()}
        for size in ("sd15", "sd21", "sdxl")
    }
    assert counts["sd15"] == {"unet": 859_520_964, "autoencoder": 83_653_863, "clip": 123_060_480}
    assert counts["sd21"] == {"unet": 865_910_724, "autoencoder": 83_653_863, "clip": 340_387_840}
    assert counts["sdxl"] == {
        "unet": 2_567_463_684,
        "autoencoder": 83_653_863,
        "clip": 123_060_480,
        "clip_g": 694_659_840,
    }
