"""`snapgen sample --out`: one sheet or one file an image, in the format that the name says, refused before it draws."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from snapgen_jax import generation
from snapgen_jax.cli import main
from snapgen_jax.image_files import destination
from snapgen_jax.training.exits import ConfigError, ExitCode
from tests.generators_for_tests import SIDE, by_prompt

SCHEDULER = pathlib.Path(__file__).parent / "export" / "scheduler_schema_1.json"


@pytest.fixture
def drawn(monkeypatch):
    """The runs that were loaded; each draws the grey that its prompt spells."""
    loaded = []
    monkeypatch.setattr(generation, "load", lambda *_, **__: loaded.append(by_prompt()) or loaded[-1])
    return loaded


def sample(out, *options):
    return main(["sample", "--workdir=run", "--prompt=70", "--prompt=140", f"--out={out}", *options])


def greys(folder):
    """{file: grey, where all of it is one}, of all files in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
            assert pixels.shape == (SIDE, SIDE, 3) and np.ptp(pixels) <= 1, path
            found[str(path.relative_to(folder))] = round(pixels.mean())
    return found


@pytest.mark.parametrize(
    ("out", "files", "said"),
    [
        ("", ["000.png", "001.png"], "000.png ... "),
        ("new/", ["new/000.png", "new/001.png"], "new/001.png"),
        ("out_{index}.png", ["out_0.png", "out_1.png"], "out_1.png"),
        ("out_{index:02d}.webp", ["out_00.webp", "out_01.webp"], "out_01.webp"),
        ("a/b/50%_%03d.JPG", ["a/b/50%_000.JPG", "a/b/50%_001.JPG"], "50%_001.JPG"),
        ("%d.jpeg", ["0.jpeg", "1.jpeg"], "1.jpeg"),
    ],
)
def test_a_folder_or_a_pattern_gets_one_file_an_image(drawn, out, files, said, tmp_path, capsys):
    assert sample(f"{tmp_path}/{out}" if out else tmp_path) == ExitCode.DONE
    assert greys(tmp_path) == dict(zip(files, (70, 140), strict=True))
    told, told_while_waiting = capsys.readouterr()
    assert "compiling the generator; a large run takes minutes" in told_while_waiting
    assert f"wrote 2 images of {SIDE} x {SIDE} px to {tmp_path / files[0]} ... {tmp_path / files[1]}" in told
    assert said in told


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")])
def test_a_sheet_is_in_the_format_of_its_suffix(drawn, suffix, kind, tmp_path, capsys):
    assert sample(tmp_path / f"sheet{suffix}") == ExitCode.DONE
    assert [path.name for path in tmp_path.iterdir()] == [f"sheet{suffix}"]
    with Image.open(tmp_path / f"sheet{suffix}") as sheet:
        assert sheet.format == kind and sheet.width > 2 * 112
    assert f"wrote 2 images of {SIDE} x {SIDE} px to {tmp_path / 'sheet'}{suffix}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("sheet.gif", "ends in no format of images; let it end in .png, .jpg, .jpeg or .webp, or in / for a folder"),
        ("sheet", "ends in no format of images"),
        ("{prompt}.png", "only {index}, {index:03d} or %03d is filled in"),
        ("{index:x}.png", "only {index}, {index:03d} or %03d is filled in"),
        ("{index}/a.png", "numbers a folder; put {index} or %03d into the name of the file alone"),
        ("there/", "is a file; leave the slash out to write a sheet, or name a folder"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_before_anything_is_drawn(drawn, out, message, tmp_path, capsys):
    (tmp_path / "there").write_text("")
    assert sample(f"{tmp_path}/{out}") == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err and not drawn
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_no_file_is_touched_where_one_of_the_pictures_cannot_be_encoded(tmp_path):
    (tmp_path / "0.webp").write_bytes(b"of before")
    long = np.zeros((1, 16384, 3), np.uint8)  # one pixel more than WebP holds
    with pytest.raises(ConfigError, match=r"1\.webp cannot hold a picture of 16384 x 1 px .*; write \.png"):
        destination(f"{tmp_path}/%d.webp").write([long[:, :8], long], [])
    assert [path.name for path in tmp_path.iterdir()] == ["0.webp"]
    assert (tmp_path / "0.webp").read_bytes() == b"of before"


# --- the precision of a bundle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "precision"), [([], "f32"), (["--precision=f16"], "f16")])
def test_a_bundle_draws_in_the_precision_that_is_asked_for(option, precision, monkeypatch, tmp_path):
    asked = []

    class Bundle:
        def __init__(self, folder, *, unpacking, precision="f32"):
            asked.append(precision)

        def generate(self, prompts, seed):
            return by_prompt().generate(prompts, seed=seed)

    monkeypatch.setattr("snapgen_jax.export.client.LiteRTGenerator", Bundle)
    out = f"--out={tmp_path / 'sheet.png'}"
    assert main(["sample", "--bundle=bundle", "--prompt=1", out, *option]) == ExitCode.DONE
    assert asked == [precision]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bundle", "no precision 'f8' in this bundle; it has f32, f16"),
        ("workdir", "--precision goes with --bundle"),
        ("weights", "--precision goes with --bundle"),
    ],
)
def test_a_precision_that_is_not_there_is_refused(drawn, source, message, tmp_path, capsys):
    manifest = {"schema": 1, "precisions": ["f32", "f16"], "units": {}, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "scheduler.json").write_text(SCHEDULER.read_text())
    assert main(["sample", f"--{source}={tmp_path}", "--prompt=1", "--precision=f8"]) == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err and not drawn
