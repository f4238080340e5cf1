"""Stable Video Diffusion makes of a photograph the clip that diffusers makes."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from snapgen_jax import cli
from snapgen_jax.config import complete
from snapgen_jax.generation import load_system
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.systems.svd import SVD, SVDConfig, read_schedule
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.checkpoint import WeightsError
from tests.parity import GOLDENS

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline, whose UNet and autoencoder lie among the goldens already."""
    place = tmp_path_factory.mktemp("svd") / "pipeline"
    shutil.copytree(GOLDENS / "pipeline_svd", place)
    for part, golden in (("unet", "svd_unet"), ("vae", "svd_autoencoder")):
        (place / part).symlink_to(GOLDENS / golden)
    return place


def tiny(**changes):
    values = {"system": "svd", "size": "any", "image_size": (16, 24), "frames": 3, "steps": 5, "chunk": 2}
    return complete({**values, "augmentation": 0.0, "dtype": "float32", **changes})


def test_a_photograph_becomes_the_clip_of_diffusers(folder):
    golden = np.load(folder / "frames.npz")
    made = load_system(tiny(), folder).animate(golden["photograph"], noise=golden["noise"])
    assert made["image"].shape == (3, 16, 24, 3)
    assert np.abs(np.clip(made["pixels"] / 2 + 0.5, 0, 1) - golden["frames"]).max() <= 1e-3
    assert golden["frames"].std() > 0.05 and np.abs(np.diff(golden["frames"], axis=0)).max() > 1e-2


@pytest.mark.oracle
def test_a_live_pipeline_of_diffusers_makes_the_same(tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import svd_pipeline as oracle

    expected = oracle.run(oracle.make(tmp_path, seed=20))
    made = load_system(tiny(), tmp_path).animate(oracle.photograph(), noise=oracle.noise())["pixels"]
    assert np.abs(np.clip(made / 2 + 0.5, 0, 1) - expected).max() <= 1e-3


def test_the_command_of_the_config_writes_the_frames(folder, tmp_path, capsys):
    Image.fromarray(np.load(folder / "frames.npz")["photograph"]).save(tmp_path / "photograph.png")
    arguments = ["sample", f"--config={ROOT}/configs/teacher/svd.py:runlocal", f"--weights={folder}"]
    arguments += [f"--out={tmp_path}/clip/", "--config.image_size=(8,8)", "--config.steps=1"]
    assert cli.main([*arguments, f"--condition=image={tmp_path}/photograph.png"]) == 0
    assert "3 images of 8 x 8 px" in capsys.readouterr().out
    assert len(list((tmp_path / "clip").iterdir())) == 3
    for more, match in (
        (["--prompt=a fox"], "reads no text"),
        ([f"--condition=image={tmp_path}/none.png"], "no picture that can be read"),
    ):
        assert cli.main([*arguments, *more]) == 78
        assert match in capsys.readouterr().err


def test_what_is_no_stable_video_diffusion_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="not that of Stable Video Diffusion"):
        load_system(tiny(size="svd"), folder)
    with pytest.raises(ConfigError, match="multiples of 4"):
        load_system(tiny(image_size=(18, 24)), folder)
    (tmp_path / "scheduler").mkdir()
    values = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**values, "use_karras_sigmas": False}))
    with pytest.raises(WeightsError, match="use_karras_sigmas = False"):
        read_schedule(tmp_path)


def test_the_published_size_counts_as_published():
    counts = {name: count_parameters(spec) for name, spec in SVD(SVDConfig()).specs.items()}
    assert counts == {"unet": 1_524_623_082, "autoencoder": 97_742_847, "image_encoder": 632_076_800}
