"""`snapgen prepare collect`: what is kept and why not, the same whatever the runner, and whole or not at all."""

import contextlib
import dataclasses
import html.parser
import json
import resource
import sys

import ml_dtypes  # noqa: F401
import numpy as np
import pytest
from PIL import Image

from snapgen_jax.cli import main
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.images import decode
from snapgen_jax.data.records import unpack
from snapgen_jax.data.shards import Records, check_files, read_manifest
from snapgen_jax.preparation import collect as collection
from snapgen_jax.preparation import inspection
from snapgen_jax.preparation.collect_config import CollectConfig, FilterConfig
from tests.preparation.conftest import EVIL, encoded

FILTERS = FilterConfig(
    bounds={"aesthetic": (5.0, None)},
    least_characters=2,
    least_side=64,
    greatest_aspect=4.0,
    near_duplicate_bits=6,
)
KEPT = {f"good/{name}_{n}.jpg" for name in ("temple", "flower") for n in range(5)} - {"good/temple_0.jpg"}
KEPT |= {"a_copy.jpg", "good/evil.jpg", "good/flat.bmp", "good/turned.jpg"}


def config_of(folder, **changes):
    captions = {"short": 1.0, "long": 3.0}
    return CollectConfig(path=str(folder), captions=captions, texts=("licence",), filters=FILTERS, shards=3, **changes)


@pytest.fixture(scope="module")
def collected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("collected")
    return out, collection.collect(config_of(folder), out)


def records_of(out):
    manifest = read_manifest(out)
    check_files(out, manifest)
    records = Records(out, manifest.shards)
    examples = [unpack(records[i]) for i in range(len(records))]
    return {example["id"]: example for example in examples}


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_is_kept_and_why_not_the_rest(collected):
    out, outcome = collected
    assert set(records_of(out)) == KEPT
    assert outcome.rejected == {
        "aspect ratio": 1,
        "caption length": 1,
        "column aesthetic": 2,
        "duplicate": 1,
        "near duplicate": 1,
        "no caption": 1,
        "small": 1,
        "unreadable": 2,
    }
    facts = read_manifest(out).facts
    assert facts["rejected"] == outcome.rejected and facts["kept"] == len(KEPT) == outcome.kept
    assert facts["read"] == len(KEPT) + 10
    told = {c.id: (c.reason, c.detail) for found in outcome.examples.values() for c in found if c.reason}
    assert told["good/temple_0.jpg"] == ("duplicate", "a_copy.jpg"), "of equal files the least id stays"
    assert told["z_like.png"] == ("near duplicate", "good/flower_0.jpg")
    assert told["ugly.jpg"] == ("column aesthetic", "1.5") and told["unjudged.jpg"] == ("column aesthetic", "missing")


def test_a_record_holds_the_file_as_it_was_with_captions_weights_and_columns(collected, folder):
    out, _ = collected
    records, manifest = records_of(out), read_manifest(out)
    assert manifest.kind == "images"
    for id, example in records.items():
        assert example.keys() == manifest.arrays.keys()
        for name, entry in manifest.arrays.items():
            value = example[name]
            if entry.dtype in ("text", "bytes"):
                kinds = (list if entry.captions else str) if entry.dtype == "text" else bytes
                assert isinstance(value, kinds)
            else:
                assert value.dtype == entry.dtype and value.ndim == entry.captions
        if not id.endswith(".bmp"):
            assert example["image"] == (folder / id).read_bytes()
        assert decode(example["image"]).shape[:2] == (example["height"], example["width"])
    flower = records["good/flower_1.jpg"]
    assert flower["captions"] == ["a photo", "flower_1, said at length", "flower_1, in other words"]
    np.testing.assert_allclose(flower["caption_weights"], [0.25, 0.375, 0.375])
    assert flower["aesthetic"] == 11.0 and flower["licence"] == "CC0"


def test_a_picture_that_is_neither_jpeg_png_nor_webp_becomes_png_without_loss(collected, folder):
    record = records_of(collected[0])["good/flat.bmp"]
    assert record["image"].startswith(b"\x89PNG")
    np.testing.assert_array_equal(decode(record["image"]), np.asarray(Image.open(folder / "good/flat.bmp")))


def test_a_photograph_has_the_size_at_which_it_is_shown(collected):
    record = records_of(collected[0])["good/turned.jpg"]
    assert (record["height"], record["width"]) == (200, 130)


def test_shards_are_shared_out_and_sorted_by_the_hash_of_the_id(collected):
    manifest = read_manifest(collected[0])
    assert len(manifest.shards) == 3 and all(shard.examples for shard in manifest.shards)
    hashes = [collection._hash(id) for id in records_of(collected[0])]
    assert hashes == sorted(hashes)


def test_another_parallelism_gives_the_same_bytes(collected, folder, tmp_path, capsys):
    command = ["prepare", "collect", f"--path={folder}", f"--out={tmp_path}", "--config.shards=3"]
    command += ["--config.captions={'short': 1, 'long': 3}", "--config.texts=('licence',)"]
    for name, value in dataclasses.asdict(FILTERS).items():
        command.append(f"--config.filters.{name}={value}")
    beam = ["--beam.direct_num_workers=3", "--", "--direct_running_mode=multi_threading"]
    assert main([*command, *beam]) == 0
    assert contents(tmp_path) == contents(collected[0])
    assert f"kept {len(KEPT)} of {len(KEPT) + 10} images" in capsys.readouterr().out
    before = contents(tmp_path)
    assert main(command) == 0 and contents(tmp_path) == before  # it is there
    assert f"kept {len(KEPT)} of {len(KEPT) + 10} images" in capsys.readouterr().out
    assert main([*command, "--config.shards=4"]) == 78
    assert "holds another collection" in capsys.readouterr().err and contents(tmp_path) == before


def test_a_notebook_collects_as_a_terminal_does(folder, tmp_path, monkeypatch):
    from apache_beam.utils import interactive_utils

    monkeypatch.setattr(interactive_utils, "is_in_ipython", lambda: True)
    assert collection.collect(CollectConfig(path=str(folder), captions={"short": 1.0}), tmp_path).kept
    assert interactive_utils.is_in_ipython()


class Page(html.parser.HTMLParser):
    """Tags and texts of a page; every tag that is opened is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_every_reason_with_pictures_and_escapes_captions(collected):
    out, outcome = collected
    text = (out / "report.html").read_text()
    found = Page(text)
    assert found.open == [] and "script" not in {tag for tag, _ in found.tags}
    assert EVIL in found.text and EVIL not in text
    for reason in outcome.rejected:
        assert f"Rejected: {reason}" in found.text
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    # all rejected but two that are damaged; both duplicates beside what they duplicate; the first of those kept
    assert len(sources) == 8 + 2 + min(len(KEPT), CollectConfig.examples_shown)
    card = text[text.index("Rejected: near duplicate") :].split("</figure>")[0]
    assert "z_like.png" in card and "of good/flower_0.jpg" in card and card.count("<img") == 2
    assert "64 to 1272128 to 25511" in found.text


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(collected, folder, tmp_path, monkeypatch):
    """The second time nothing is read again but the bytes of what is written."""
    written, write_shard = [], collection.write_shard

    def stopped(*arguments):
        if written:
            raise DataError("stopped")
        written.append(write_shard(*arguments))
        return written[-1]

    with monkeypatch.context() as patch:
        patch.setattr(collection, "write_shard", stopped)
        with pytest.raises(DataError, match=r"^stopped$"):
            collection.collect(config_of(folder), tmp_path)
    assert written and not (tmp_path / "manifest.json").exists() and not (tmp_path / "report.html").exists()
    with pytest.raises(DataError, match="has not ended"):
        read_manifest(tmp_path)
    (tmp_path / "images-00007-of-00009.array_record").write_bytes(b"of a run with other options")
    monkeypatch.setattr(inspection, "inspect", None)
    collection.collect(config_of(folder), tmp_path)
    assert contents(tmp_path) == contents(collected[0])


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def one(tmp_path, pixels):
    """A folder of one bitmap, whose PNG has some 12 kB."""
    root = tmp_path / "one"
    root.mkdir()
    (root / "noise.bmp").write_bytes(encoded(pixels, "BMP"))
    (root / "noise.txt").write_text("noise")
    return root


def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(one, tmp_path):
    out = tmp_path / "out"
    with full_disk(6000), pytest.raises(DataError, match=r"cannot be written: .*make room, then") as error:
        collection.collect(CollectConfig(path=str(one)), out)
    assert "while running" not in str(error.value)
    assert [path.name for path in out.iterdir()] == [".collecting"]
    assert not [path for path in out.rglob("*") if path.is_file()]
    (out / "report.html").write_text("of a run that was stopped")
    collection.collect(CollectConfig(path=str(one)), out)
    np.testing.assert_array_equal(decode(records_of(out)["noise.bmp"]["image"]), decode(str(one / "noise.bmp")))


def test_images_without_captions_are_kept_where_none_is_asked_for(one, tmp_path):
    (one / "noise.txt").unlink()
    collection.collect(CollectConfig(path=str(one), filters=FilterConfig(least_characters=0)), tmp_path / "out")
    assert records_of(tmp_path / "out")["noise.bmp"]["captions"] == [""]


def test_a_folder_of_other_files_is_refused_and_left_alone(one, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    with pytest.raises(DataError, match=r"holds files of something else, report.html for one; give an empty folder"):
        collection.collect(CollectConfig(path=str(one)), out)
    assert contents(out) == {"report.html": b"mine"}


def test_a_source_that_changes_meanwhile_is_an_error(one, tmp_path, monkeypatch):
    reader = collection.PlaceReader.read
    monkeypatch.setattr(collection.PlaceReader, "read", lambda self, place: reader(self, place)[:-1] + b"x")
    with pytest.raises(DataError, match=r"noise.bmp changed while it was collected"):
        collection.collect(CollectConfig(path=str(one)), tmp_path / "out")


def test_without_beam_the_extra_is_named(one, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(DataError, match=r"pip install 'snapgen-jax\[prepare\]'"):
        collection.collect(CollectConfig(path=str(one)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--source=zip"], "choose one of 'folder', 'tar', 'parquet', 'huggingface', 'tfds', 'shards'"),
        (["--path=nowhere"], "there is no folder"),
        (["--config.filters.least_sid=3"], "did you mean 'least_side'"),
        (["--config.filters.greatest_aspect=0.5"], "1 or more"),
        (["--config.filters.bounds.score=(5,1)"], "swap them"),
        (["--config.numbers=('height',)"], "every record has"),
        (["--beam.runner=Nope"], "Unexpected pipeline runner"),
    ],
)
def test_what_nobody_can_mean_is_refused_before_anything_is_written(options, said, one, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prepare", "collect", f"--path={one}", f"--out={out}", *options]) == 78
    assert said in capsys.readouterr().err
    assert not list(out.rglob("*.array_record")) and not (out / "manifest.json").exists()


def test_a_config_file_says_the_same_and_the_command_line_overrides_it(one, tmp_path, capsys):
    file = tmp_path / "photographs.py"
    values = {"path": str(one), "filters": {"least_side": 65, "greatest_aspect": 2.0}}
    file.write_text(f"def get_config(arg=None):\n    return {values}\n")
    command = ["prepare", "collect", f"--config={file}", f"--out={tmp_path / 'out'}", "--config.filters.least_side=64"]
    assert main(command) == 0
    filters = json.loads((tmp_path / "out/manifest.json").read_text())["facts"]["config"]["filters"]
    assert (filters["least_side"], filters["greatest_aspect"]) == (64, 2.0)
