"""A folder of one's own photographs with captions trains, resumes and samples by the commands of the README."""

import pytest
from etils import epath
from PIL import Image
from sklearn.datasets import load_sample_images

from snapgen_jax.cli import main
from snapgen_jax.parallel.mesh import MeshConfig
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.status import status


@pytest.fixture
def photographs(tmp_path):
    """Crops of real photographs, wide and tall, each with a .txt beside it."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, image in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for n in range(6):
            box = (40 * n, 20 * n, 40 * n + (300 if n % 2 else 200), 20 * n + (200 if n % 2 else 300))
            Image.fromarray(image).crop(box).save(folder / f"{name}_{n}.jpg")
            (folder / f"{name}_{n}.txt").write_text(f"a photo of a {name}")
    return folder


@pytest.mark.slow
def test_own_photographs_train_resume_and_sample(photographs, tmp_path, monkeypatch, quick_to_compile):
    one_device = loop.make_mesh(MeshConfig(data=1), loop.jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda config: one_device)  # the tests pretend to have eight
    run = tmp_path / "run"
    train = [
        "train",
        "--config=configs/folder.py:runlocal",
        f"--config.data.path={photographs}",
        f"--workdir={run}",
        "--config.inputs.image_sizes=((24,32),(32,24))",
        "--config.optimizer.schedule=constant",  # one program for both parts, whatever their length
        "--config.evaluation.during=('sample_grid',)",
        "--config.evaluation.final=('sample_grid',)",
        "--config.tensorboard=False",
    ]
    assert main([*train, "--config.train_steps=6"]) == 0
    assert Checkpointer(run).latest_step() == 6
    assert main(train) == 0
    assert "12 of 12" in status(epath.Path(run))
    assert len(list((run / "samples").glob("samples_*.png"))) == 2
    picture = tmp_path / "mine.png"
    sample = ["sample", f"--workdir={run}", "--prompt=a photo of a flower", f"--out={picture}"]
    assert main([*sample, "--steps=2", "--method=heun"]) == 0
    assert Image.open(picture).size[0] > 32
