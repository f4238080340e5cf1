"""Many images of a run: each by its index, whole or absent, the same after any stop and on any number of hosts."""

import collections
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from snapgen_jax import drawing
from snapgen_jax.data.config import DataConfig
from snapgen_jax.training.exits import ConfigError, ExitCode
from tests.draw_process import CLASSES, TOLD, generator
from tests.flags import xla_flags
from tests.generators_for_tests import by_edit, by_prompt

COUNT = 40  # of blocks of three: the last has one


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """All images, drawn at once on two devices."""
    folder = tmp_path_factory.mktemp("straight")
    assert drawing.draw(generator(2), TOLD, folder, COUNT, batch_size=3) == COUNT
    return folder


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_image_i_is_that_of_seed_and_index_and_every_class_is_drawn_as_often(straight):
    made = generator(1)
    expected = made.generate(conditions={"label": np.arange(COUNT) % CLASSES}, indices=list(range(COUNT)), seed=0)
    assert list(files(straight)) == [f"{i:06d}.png" for i in range(COUNT)]
    for i in range(COUNT):
        np.testing.assert_array_equal(np.asarray(Image.open(straight / f"{i:06d}.png")), expected[i])
    labels = collections.Counter(int(image.min()) // 10 for image in expected)
    assert labels == dict.fromkeys(range(CLASSES), COUNT // CLASSES)


def test_another_number_of_devices_draws_the_same(straight, tmp_path):
    drawing.draw(generator(8), TOLD, tmp_path, COUNT, batch_size=3)
    assert files(tmp_path) == files(straight)


def test_more_images_later_leave_those_of_before_as_they_are(straight, tmp_path):
    drawing.draw(generator(2), TOLD, tmp_path, 10, batch_size=3)
    assert drawing.draw(generator(2), TOLD, tmp_path, COUNT, batch_size=3) == COUNT - 10
    assert files(tmp_path) == files(straight)


def test_prompts_are_taken_in_turn(tmp_path):
    (tmp_path / "prompts.txt").write_text("70\n\n140\n")
    told = drawing.told_prompts(str(tmp_path / "prompts.txt"))
    drawing.draw(by_prompt(), told, tmp_path / "out", 5, batch_size=2)
    greys = [np.asarray(Image.open(tmp_path / "out" / f"00000{i}.png"))[0, 0, 0] for i in range(5)]
    assert greys == [70, 140, 70, 140, 70]


def test_classes_are_told_by_their_names_where_a_run_takes_prompts(tmp_path):
    (tmp_path / "names.txt").write_text("tench\nelectric_ray\n")
    by_file = DataConfig(source="tfds", name="imagenet2012", class_names=str(tmp_path / "names.txt"))
    told = drawing.told_classes(by_prompt(), by_file, "uniform")
    assert told.texts == ("a photo of a tench", "a photo of an electric ray")
    assert drawing.told_classes(by_prompt(), DataConfig(), str(tmp_path / "names.txt")) == told
    digits = drawing.told_classes(by_prompt(), DataConfig(source="digits"), "uniform")
    assert len(digits.texts) == 10 and digits.texts[8] == "a photo of an eight"
    assert drawing.told_classes(generator(1), DataConfig(), "uniform") == TOLD


def test_all_images_are_also_written_as_one_array(straight, tmp_path):
    drawing.write_npz(straight, list(files(straight)), tmp_path / "drawn.npz")
    with np.load(tmp_path / "drawn.npz") as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert images.shape == (COUNT, 8, 8, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[7], np.asarray(Image.open(straight / "000007.png")))
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.npz"]


# --- stopped and resumed ---------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_drawn_and_it_is_the_same(straight, tmp_path):
    folder = pathlib.Path(shutil.copytree(straight, tmp_path / "out"))
    for index in (4, 5, 39):
        (folder / f"{index:06d}.png").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    asked = []
    made = generator(2)
    run, made.run = made.run, lambda *a, **options: asked.append(options["indices"]) or run(*a, **options)
    assert drawing.draw(made, TOLD, folder, COUNT, batch_size=3) == 3
    assert asked == [[3, 4, 5, 39, 39, 39]]  # two blocks at once
    assert files(folder) == files(straight)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}.items()
    assert drawing.draw(made, TOLD, folder, COUNT, batch_size=3) == 0 and len(asked) == 1


def process(folder, **options):
    given = {"folder": str(folder), "count": COUNT, "processes": 1, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.draw_process", json.dumps(given)],
        env={**os.environ, "XLA_FLAGS": xla_flags(2)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, ExitCode.PREEMPTED)], ids=["kill", "term"]
)
def test_killed_in_between_and_run_again_it_has_drawn_the_same(straight, tmp_path, number, code):
    begun = process(tmp_path, seconds=0.3)
    while len(files(tmp_path)) < 12:
        assert begun.poll() is None, begun.stdout.read()
        time.sleep(0.01)
    begun.send_signal(number)
    said, _ = begun.communicate(timeout=60)
    assert begun.returncode == code, said
    partial = files(tmp_path)
    assert 12 <= len(partial) < COUNT and partial.items() <= files(straight).items()  # each whole
    assert drawing.draw(generator(2), TOLD, tmp_path, COUNT, batch_size=3) == COUNT - len(partial)
    assert files(tmp_path) == files(straight)


def test_two_processes_share_out_the_images_and_one_puts_them_together(straight, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    npz = tmp_path / "drawn.npz"
    where = {"processes": 2, "coordinator": f"localhost:{port}", "npz": str(npz)}
    both = [process(tmp_path / "out", **where, index=index) for index in (0, 1)]
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [ExitCode.DONE] * 2, said
    indices = [
        {int(n) for line in text.splitlines() if line.startswith("drawing") for n in line.split()[1:]} for text in said
    ]
    assert not indices[0] & indices[1] and indices[0] | indices[1] == set(range(COUNT))
    assert files(tmp_path / "out") == files(straight)
    with np.load(npz) as archive:
        assert archive["arr_0"].shape == (COUNT, 8, 8, 3)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "drawn otherwise .seed 0, now 1.; give another --out"),
        ({"step": 7}, "step None, now 7"),
        ({"options": {"guidance": 2.0}}, "options .*'guidance': 1.0.*, now .*'guidance': 2.0"),
    ],
)
def test_a_folder_of_images_that_were_drawn_otherwise_is_refused(straight, changes, message):
    before = files(straight)
    with pytest.raises(ConfigError, match=message):
        drawing.draw(generator(1), TOLD, straight, COUNT, batch_size=3, **changes)
    with pytest.raises(ConfigError, match="told "):
        drawing.draw(generator(1), drawing.Told(label="label", classes=4), straight, COUNT, batch_size=3)
    assert files(straight) == before


def test_a_folder_of_images_of_nobody_knows_what_is_refused(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds images that are not of this command, 000000.png for one"):
        drawing.draw(generator(1), TOLD, tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.png"]


def test_an_array_of_images_of_which_some_are_missing_is_not_written(straight, tmp_path):
    names = [*files(straight), "000040.png"]
    with pytest.raises(ConfigError, match=r"1 of 41 images are not in .*, 000040.png for one"):
        drawing.write_npz(straight, names, tmp_path / "drawn.npz")
    damaged = pathlib.Path(shutil.copytree(straight, tmp_path / "out"))
    (damaged / "000021.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"000021.png is no image"):
        drawing.write_npz(damaged, list(files(straight)), tmp_path / "drawn.npz")
    assert not (tmp_path / "drawn.npz").exists()


@pytest.mark.parametrize(
    ("made", "data", "classes", "message"),
    [
        (by_prompt, DataConfig(), "uniform", "names no classes in data.class_names; give --classes=FILE"),
        (
            by_prompt,
            DataConfig(source="tfds", class_names="nowhere"),
            "uniform",
            "class names 'nowhere' cannot be read",
        ),
        (by_edit, DataConfig(), "uniform", "takes prompts or one class label, and this takes source"),
        (lambda: generator(1), DataConfig(), "names.txt", "labels, which need no names; give --classes=uniform"),
    ],
)
def test_a_run_without_classes_is_refused(made, data, classes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        drawing.told_classes(made(), data, classes)


@pytest.mark.parametrize("numbers", [{"count": 0}, {"batch_size": 0, "count": 1}])
def test_numbers_that_make_no_sense_are_refused(tmp_path, numbers):
    with pytest.raises(ConfigError, match="give 1 or more"):
        drawing.draw(generator(1), TOLD, tmp_path, **numbers)
