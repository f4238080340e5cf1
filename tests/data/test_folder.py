"""A person's own folder: the caption conventions, and what a wrong folder is told."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.sources import Source, build_source


def _image(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)


def _folder(path: pathlib.Path, split="train", **changes) -> Source:
    return build_source(DataConfig(source="folder", path=str(path), **changes), split)


def _captions(source: Source) -> dict[str, str]:
    return {source.name(i): source.example(i, np.random.default_rng(0))["caption"] for i in range(len(source))}


def test_real_photographs_are_read_with_their_captions(photo_folder, photographs) -> None:
    source = _folder(photo_folder)
    assert set(_captions(source).values()) == set(photographs)
    for index in range(len(source)):
        example = source.example(index, np.random.default_rng(0))
        original = np.asarray(photographs[example["caption"]].convert("RGB")).astype(float)
        assert example["image"].shape == original.shape
        assert np.abs(example["image"] - original).mean() < 5, "JPEG at quality 90"
        assert source.sizes()[index].tolist() == list(original.shape[:2])


def test_metadata_csv(tmp_path) -> None:
    _image(tmp_path / "a.png")
    _image(tmp_path / "b, c.png")
    (tmp_path / "metadata.csv").write_text('﻿file_name,caption\na.png,"one, two"\n"b, c.png",three\n', encoding="utf-8")
    assert _captions(_folder(tmp_path)) == {"a.png": "one, two", "b, c.png": "three"}


def test_a_csv_caption_may_hold_line_breaks(tmp_path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one\ntwo"\n')
    assert _captions(_folder(tmp_path)) == {"a.png": "one two"}


def test_metadata_files_in_subfolders_are_relative_to_themselves(tmp_path) -> None:
    for part in ("x", "y/z"):
        _image(tmp_path / part / "deep" / "a.png")
        row = {"file_name": "deep/a.png", "text": f"from {part}"}
        (tmp_path / part / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    assert _captions(_folder(tmp_path)) == {"x/deep/a.png": "from x", "y/z/deep/a.png": "from y/z"}


def test_of_several_captions_each_draw_takes_one(tmp_path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": ["one", "two", "three"]}))
    source = _folder(tmp_path)
    assert {source.example(0, np.random.default_rng(i))["caption"] for i in range(50)} == {"one", "two", "three"}


def test_captions_are_read_without_opening_the_image(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a red picture")
    source = _folder(tmp_path)
    assert source.example(0, np.random.default_rng(0), ("caption",)) == {"caption": "a red picture"}
    with pytest.raises(UnreadableExampleError):
        source.example(0, np.random.default_rng(0), ("image",))


def test_text_files_beside_images_at_any_depth(tmp_path, caplog) -> None:
    for name in ("a.png", "sub/b.JPG", "sub/without.png"):
        _image(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a red\n  picture \n")
    (tmp_path / "sub" / "b.txt").write_text("another")
    (tmp_path / "notes.txt").write_text("belongs to no image")
    assert _captions(_folder(tmp_path)) == {"a.png": "a red picture", "sub/b.JPG": "another"}
    assert "1 of 3 images have no caption" in caplog.text


@pytest.mark.parametrize("file_name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", ".", "a/.."])
def test_metadata_may_not_leave_its_folder(tmp_path, file_name: str) -> None:
    _image(tmp_path / "secret.png")
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "metadata.jsonl").write_text(json.dumps({"file_name": file_name, "text": "x"}))
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: file_name .* leaves the folder"):
        _folder(inside)


def test_what_other_programs_leave_beside_images_is_no_data(tmp_path) -> None:
    for name in ("a.png", ".b.png", "._a.png", ".trash/a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a.png"):
        _image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"of {name}")
    assert _captions(_folder(tmp_path)) == {"a.png": "of a.png"}
    assert _captions(_folder(tmp_path, captions="none")) == {"a.png": ""}
    for folder in (".trash", "__MACOSX"):
        (tmp_path / folder / "metadata.csv").write_text("file_name,text\nmissing.png,x\n")
    assert _captions(_folder(tmp_path)) == {"a.png": "of a.png"}
    hidden = tmp_path / ".trash"
    assert len(_folder(hidden, captions="none")) == 1, "the folder that is asked for may be called anything"


def test_a_csv_row_with_more_fields_than_its_header_is_refused(tmp_path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,red, green, blue\n")
    with pytest.raises(DataError, match=r"line 2: the row has 4 fields and the header 2 columns .* in double quotes"):
        _folder(tmp_path)


@pytest.mark.parametrize("form", ["a.txt", "metadata.csv", "metadata.jsonl"])
def test_a_caption_may_be_of_any_length(tmp_path, form: str) -> None:
    _image(tmp_path / "a.png")
    caption = "a very red picture " * 20_000
    row = json.dumps({"file_name": "a.png", "text": caption})
    content = {"a.txt": caption, "metadata.csv": f"file_name,text\na.png,{caption}\n", "metadata.jsonl": row}[form]
    (tmp_path / form).write_text(content)
    limit = csv.field_size_limit()
    assert _captions(_folder(tmp_path)) == {"a.png": caption.strip()}
    assert csv.field_size_limit() == limit, "other users of csv keep theirs"


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt cannot be read as UTF-8 text: .*0xe9.*; save it as UTF-8"),
        ("a.txt", "red".encode("utf-16"), r"a\.txt cannot be read as UTF-8 text"),
        ("a.txt", "red".encode("utf-16-le"), r"a\.txt: the caption .* holds NUL, as UTF-16 does"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", r"metadata\.csv cannot be read as UTF-8 text"),
        ("metadata.csv", b"file_name,text\na.png,a\0b\n", "line 2: the caption .* holds NUL"),
        ("metadata.csv", b'file_name,text\na.png,"red\nb.png,blue\n', "line 2 is not CSV: unexpected end"),
        ("metadata.csv", b'file_name,text\na.png,"red" or so\n', "line 2 is not CSV: "),
        ("metadata.csv", b"file_name,text\na\0.png,red\n", "line 2: file_name .* is the name of no file"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\\ud83d"}', r"line 1: the caption .* at '\\ud83d'"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ["fine", "\\ud83d"]}', "it was not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "\\ud83d.png", "text": "red"}', "file_name .* is the name of no file"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ' + b"[" * 200_000, "line 1 is not JSON"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": ' + b"9" * 5_000 + b"}", "line 1 is not JSON"),
    ],
)
def test_captions_that_are_no_text_are_named(tmp_path, form: str, content: bytes, message: str) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / form).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _folder(tmp_path)


@pytest.mark.parametrize("form", ["metadata.csv", "metadata.jsonl"])
def test_rows_of_one_image_are_one_example_of_one_split(tmp_path, form: str) -> None:
    rows = [(f"{n}.png", f"caption {k} of {n}") for k in range(3) for n in range(20)]
    for name, _ in rows[:20]:
        _image(tmp_path / name)
    lines = (json.dumps({"file_name": name, "text": text}) for name, text in rows)
    text = "file_name,text\n" + "\n".join(map(",".join, rows)) if form.endswith("csv") else "\n".join(lines)
    (tmp_path / form).write_text(text)
    train, validation = (_folder(tmp_path, split, validation_share=0.5) for split in ("train", "validation"))
    assert len(train) == len(validation) == 10 and not set(_captions(train)) & set(_captions(validation))
    for source in (train, validation):
        for index in range(len(source)):
            number = source.name(index).removesuffix(".png")
            drawn = {source.example(index, np.random.default_rng(n), ("caption",))["caption"] for n in range(40)}
            assert drawn == {f"caption {k} of {number}" for k in range(3)}


def test_repeats_do_not_hide_that_others_have_no_caption(tmp_path, caplog) -> None:
    for name in ("a.png", "b.png"):
        _image(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\na.png,two\n./a.png,three\n")
    assert list(_captions(_folder(tmp_path))) == ["a.png"]
    assert "1 of 2 images have no caption" in caplog.text


@pytest.mark.parametrize("captions", ["beside", "metadata"])
def test_a_snapshot_of_a_hub_which_is_links_into_its_cache_is_read(tmp_path, captions: str) -> None:
    snapshot = tmp_path / "snapshots" / "1a2b"
    (snapshot / "deep").mkdir(parents=True)
    contents = {"deep/a.png": "red", "deep/again.png": "red", "b.jfif": "blue"}
    texts = {"deep/a.txt": "a red one", "b.txt": "a blue one"}
    rows = [{"file_name": name, "text": f"a {colour} one"} for name, colour in contents.items()]
    files = texts if captions == "beside" else {"metadata.jsonl": "\n".join(map(json.dumps, rows))}
    for name, colour in contents.items():
        _image(blob := tmp_path / "blobs" / f"{colour}.png")
        Image.new("RGB", (8, 6), colour).save(blob)
        blob.rename(blob := blob.with_suffix(""))
        (snapshot / name).symlink_to(blob)
    for number, (name, text) in enumerate(files.items()):
        (tmp_path / "blobs" / str(number)).write_text(text)
        (snapshot / name).symlink_to(tmp_path / "blobs" / str(number))
    source = _folder(snapshot)
    assert _captions(source) == {"deep/a.png": "a red one", "b.jfif": "a blue one"}, "one file is one example"
    colours = {source.name(i): source.example(i, np.random.default_rng(0))["image"][0, 0].tolist() for i in (0, 1)}
    assert colours == {"deep/a.png": [255, 0, 0], "b.jfif": [0, 0, 255]}
    assert len(_folder(snapshot, captions="none")) == 2


def test_linked_folders_are_followed_once_and_loops_end(tmp_path) -> None:
    _image(tmp_path / "elsewhere" / "deep" / "a.png")
    root = tmp_path / "data"
    _image(root / "b.png")
    for name, target in {
        "linked": tmp_path / "elsewhere",
        "again": tmp_path / "elsewhere",
        "loop": root,
        "above": tmp_path,
        "itself": root / "itself",
    }.items():
        (root / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    assert list(_captions(_folder(root, captions="none"))) == ["again/deep/a.png", "b.png"]
    _image(root / "own" / "deep" / "c.png")
    (root / "a_link").symlink_to(root / "own" / "deep")
    assert list(_captions(_folder(root, captions="none")))[-1] == "own/deep/c.png", "not by the name of a link"


def test_a_linked_folder_has_its_own_metadata(tmp_path) -> None:
    _image(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "elsewhere" / "metadata.csv").write_text("file_name,text\na.png,from elsewhere\n")
    root = tmp_path / "data"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    assert _captions(_folder(root)) == {"linked/a.png": "from elsewhere"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"', "line 2 is not JSON"),
        ('["a.png"]', "line 2: expected a JSON object and found list"),
        ('{"image": "a.png", "text": "x"}', "line 2: expected a file_name and found the columns image, text"),
        ('{"file_name": "a.png", "label": 3}', "line 2: expected a column text or caption .* file_name, label"),
    ],
)
def test_a_wrong_metadata_line_is_named(tmp_path, line: str, message: str) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        _folder(tmp_path)


def test_missing_and_empty_folders_say_what_was_looked_for(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        _folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"needs data\.path"):
        build_source(DataConfig(source="folder"))
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(DataError, match=r"found 0 image files .*Expected\s+metadata\.jsonl or metadata\.csv"):
        _folder(tmp_path)
    _image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"found 1 image files .* no caption"):
        _folder(tmp_path)
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"both metadata\.jsonl and metadata\.csv"):
        _folder(tmp_path)


def test_validation_is_a_fixed_part_of_the_folder_that_training_never_sees(tmp_path) -> None:
    for number in range(40):
        _image(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    train, validation = (set(_captions(_folder(tmp_path, s, validation_share=0.1))) for s in ("train", "validation"))
    assert len(validation) == 4 and len(train) == 36 and not train & validation
    assert validation == set(_captions(_folder(tmp_path, "validation", validation_share=0.1)))
    assert _folder(tmp_path, "validation", validation_share=0.1).held_out


def test_a_folder_too_small_to_divide_validates_on_its_training_images(photo_folder) -> None:
    assert _captions(_folder(photo_folder, "validation")) == _captions(_folder(photo_folder, "train"))
    assert not _folder(photo_folder, "validation").held_out


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="'webdataset'; the sources are shapes, digits, folder, tfds"):
        build_source(DataConfig(source="webdataset"))  # type: ignore[arg-type]


def test_images_without_captions_are_taken_where_none_is_needed(tmp_path) -> None:
    for name in ("b.png", "deep/a.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    source = build_source(DataConfig(source="folder", path=str(tmp_path), captions="none"))
    assert [source.name(i) for i in range(len(source))] == ["b.png", "deep/a.jpg"]
    assert set(source.spec()) == {"image"}, "a recipe that reads text is refused when the pipeline is built"
    with pytest.raises(DataError, match="holds no captioned image"):
        build_source(DataConfig(source="folder", path=str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        build_source(DataConfig(source="folder", path=str(tmp_path / "empty"), captions="none"))


def test_a_folder_of_its_own_takes_the_place_of_a_held_out_share(tmp_path):
    for name in ("train/a.png", "train/b.png", "apart/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        _image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(pathlib.Path(name).name)
    apart = str(tmp_path / "apart")
    train, validation = (_folder(tmp_path / "train", s, validation_path=apart) for s in ("train", "validation"))
    assert (set(_captions(train)), set(_captions(validation))) == ({"a.png", "b.png"}, {"c.png"})
    assert validation.held_out
    with pytest.raises(DataError, match=r"data.validation_path: there is no folder"):
        _folder(tmp_path / "train", "validation", validation_path=str(tmp_path / "nowhere"))
