"""The same photographs from every kind of source, and what is wrong with one of each."""

import dataclasses
import io
import json
import pathlib
import pickle
import tarfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.shards import Manifest, StoredArray, write_shard
from snapgen_jax.preparation.collect_config import CollectConfig, FilterConfig
from snapgen_jax.preparation.places import PlaceReader
from snapgen_jax.preparation.sources.interfaces import build_source

CONFIG = CollectConfig(numbers=("score",), texts=("licence",), captions={"text": 2.0, "alt": 1.0})


@pytest.fixture(scope="module")
def rows(photographs):
    return [
        {"key": name, "image": data, "text": f"{name} or so", "alt": ["one", "other"], "score": n / 2, "licence": "CC0"}
        for n, (name, data) in enumerate(photographs.items())
    ]


def write_tar(path, rows, mode="w"):
    with tarfile.open(path, mode) as tar:
        for row in rows:
            columns = {name: row[name] for name in ("text", "alt", "score", "licence")}
            for extension, data in (("jpg", row["image"]), ("json", json.dumps(columns).encode())):
                member = tarfile.TarInfo(f"some/{row['key']}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def _folder(root, rows):
    for row in rows:
        (root / f"{row['key']}.jpg").write_bytes(row["image"])
    lines = [{"file_name": f"{row['key']}.jpg", **{k: v for k, v in row.items() if k != "image"}} for row in rows]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def _tar(root, rows):
    write_tar(root / "b.tar", rows[4:])
    write_tar(root / "a.tar", rows[:4])
    return root / "*.tar"


def _compressed_tar(root, rows):
    return write_tar(root / "a.tar.gz", rows, "w:gz")


def _parquet(root, rows, images=lambda row: row["image"]):
    table = pyarrow.Table.from_pylist([{**row, "image": images(row)} for row in rows])
    pyarrow.parquet.write_table(table, root / "a.parquet", row_group_size=4)
    return root


def _parquet_of_structs(root, rows):
    return _parquet(root, rows, lambda row: {"bytes": row["image"], "path": None})


def _parquet_of_paths(root, rows):
    for row in rows:
        (root / f"{row['key']}.jpg").write_bytes(row["image"])
    return _parquet(root, rows, lambda row: f"{row['key']}.jpg")


def _huggingface(root, rows):
    data = datasets.Dataset.from_list([{**row, "image": {"bytes": row["image"], "path": None}} for row in rows])
    data = data.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(root)
    return root


def _shards(root, rows):
    arrays = {name: StoredArray("text") for name in ("id", "text", "alt", "licence")}
    arrays |= {"image": StoredArray("bytes"), "score": StoredArray("float64")}
    examples = [{**row, "id": row["key"], "captions": ["c"], "caption_weights": np.ones(1, np.float32)} for row in rows]
    for example in examples:
        example["score"] = np.float64(example["score"])
    parts = [write_shard(root, f"{n}.array_record", examples[n::2]) for n in range(2)]
    Manifest("images", arrays, tuple(parts)).write(root)
    return root


SOURCES = {
    "folder": _folder,
    "tar": _tar,
    "tar.gz": _compressed_tar,
    "parquet": _parquet,
    "parquet structs": _parquet_of_structs,
    "parquet paths": _parquet_of_paths,
    "huggingface": _huggingface,
    "shards": _shards,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_examples(kind, rows, tmp_path):
    path = SOURCES[kind](tmp_path, rows)
    name = "tar" if kind == "tar.gz" else kind.split()[0]
    config = dataclasses.replace(CONFIG, source=name, path=str(path))
    units = build_source(config).units()
    source = pickle.loads(pickle.dumps(build_source(config)))  # as it travels to a worker
    examples = [example for unit in units for example in source.read(unit)]
    again = [example for unit in build_source(config).units() for example in source.read(unit)]
    assert examples == again and len({example.id for example in examples}) == len(rows)
    found = {example.image: example for example in examples}
    reader = PlaceReader()
    for row in rows:
        example = found.pop(row["image"])
        assert example.captions == ((row["text"], 2.0), ("one", 0.5), ("other", 0.5))
        assert example.columns == {"score": row["score"], "licence": "CC0"}
        if example.place is not None:
            assert reader.read(example.place) == row["image"]
        assert (example.place is None) == (kind in ("tar.gz", "parquet", "parquet structs", "huggingface", "shards"))
    assert not found
    reader.close()


def test_a_unit_is_known_to_have_changed(rows, tmp_path):
    for kind, file in (("tar", "b.tar"), ("folder", "flower_0.jpg"), ("parquet", "a.parquet")):
        root = tmp_path / kind
        root.mkdir()
        config = dataclasses.replace(CONFIG, source=kind, path=str(SOURCES[kind](root, rows)))
        before = [unit.state for unit in build_source(config).units()]
        assert before == [unit.state for unit in build_source(config).units()]
        with (root / file).open("ab") as stream:
            stream.write(b"\0" if kind != "parquet" else (root / file).read_bytes())
        assert before != [unit.state for unit in build_source(config).units()]


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "tar.gz"])
@pytest.mark.parametrize("field", ["captions", "numbers", "texts"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(kind, field, rows, tmp_path):
    path = SOURCES[kind](tmp_path, rows)
    asked = {"blurb": 1.0} if field == "captions" else ("blurb",)
    config = dataclasses.replace(CONFIG, source=kind.split()[0], path=str(path), **{field: asked})
    with pytest.raises(DataError, match=r"has no .*'blurb'; its columns are .*\bscore\b"):
        build_source(config)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "huggingface"])
def test_a_column_that_is_not_numeric_is_refused(kind, rows, tmp_path):
    path = SOURCES[kind](tmp_path, rows)
    filters = FilterConfig(bounds={"licence": (1.0, None)})
    config = dataclasses.replace(CONFIG, source=kind, path=str(path), numbers=(), texts=(), filters=filters)
    with pytest.raises(DataError, match=r"the column 'licence' is not numeric"):
        source = build_source(config)
        list(source.read(source.units()[0]))


def test_what_is_damaged_in_a_tar_is_told_of_its_example_alone(rows, tmp_path):
    """An empty tar before it, a member that is not text, JSON that is none, and half of a character."""
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    jsons = [b'{"text": "half \\ud83d"}', b"{", b"[" * 100_000, b'["no", "object"]']
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for number, (row, text) in enumerate(zip(rows, jsons, strict=False)):
            for extension, data in (("jpg", row["image"]), ("json", text), ("npy", b"numbers")):
                member = tarfile.TarInfo(f"{number}\udcff.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = build_source(CollectConfig(source="tar", path=str(tmp_path)))
    examples = [example for unit in source.units() for example in source.read(unit)]
    assert [example.id for example in examples] == [f"1.tar/{number}\\xff" for number in range(4)]
    assert [example.image is None for example in examples] == [False, True, True, False]
    assert all("JSON cannot be read" in example.problem for example in examples[1:3])
    assert examples[0].captions == (("half ?", 1.0),) and examples[3].captions == ()


def test_a_tar_without_images_is_refused_with_what_it_has(tmp_path):
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for extension in ("mp4", "txt"):
            tar.addfile(tarfile.TarInfo(f"1.{extension}"))
    with pytest.raises(DataError, match=r"holds no image .*its members are mp4, txt"):
        build_source(CollectConfig(source="tar", path=str(tmp_path)))


@pytest.mark.parametrize("source", ["folder", "tar", "parquet", "huggingface", "shards"])
def test_a_folder_without_images_is_refused(source, tmp_path):
    with pytest.raises(DataError, match=r"holds no|is no Hugging Face data set"):
        build_source(CollectConfig(source=source, path=str(tmp_path)))


def test_a_path_that_leaves_the_folder_is_refused(rows, tmp_path):
    (tmp_path / "outside.jpg").write_bytes(rows[0]["image"])
    root = tmp_path / "inside"
    root.mkdir()
    _parquet(root, rows, lambda row: "../outside.jpg")
    source = build_source(dataclasses.replace(CONFIG, source="parquet", path=str(root)))
    with pytest.raises(DataError, match="leaves the folder"):
        list(source.read(source.units()[0]))
    for name in ("../outside", "/etc/outside"):
        write_tar(root / "a.tar", rows[:1])
        with tarfile.open(root / "a.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(f"{name}.jpg"))
        with pytest.raises(DataError, match="leaves its folder"):
            build_source(CollectConfig(source="tar", path=str(root)))
    (root / "metadata.csv").write_text("file_name,text\n../outside.jpg,a picture\n")
    with pytest.raises(DataError, match="leaves the folder"):
        build_source(CollectConfig(path=str(root)))


def _cut_in_a_member(data: bytes, last: int) -> bytes:
    return data[: last + 600]


def _cut_between_members(data: bytes, last: int) -> bytes:
    return data[:last]


def _damaged_header(data: bytes, last: int) -> bytes:
    return data[:last] + b"\xff" * 512 + data[last + 512 :]


@pytest.mark.parametrize("damage", [_cut_in_a_member, _cut_between_members, _damaged_header])
def test_a_tar_that_is_not_whole_is_refused(damage, rows, tmp_path):
    """Python's own reader ends in silence at the second and the third."""
    path = write_tar(tmp_path / "a.tar", rows)
    config = dataclasses.replace(CONFIG, source="tar", path=str(path))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2].offset
    source = build_source(config)
    path.write_bytes(damage(path.read_bytes(), last))
    with pytest.raises(DataError, match=r"a.tar is no whole tar file"):
        list(source.read(source.units()[0]))


def test_a_compressed_tar_that_was_cut_is_refused(rows, tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", rows, "w:gz")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"a.tar.gz is no whole tar file"):
        build_source(dataclasses.replace(CONFIG, source="tar", path=str(path)))


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"a.parquet is no Parquet file"):
        build_source(CollectConfig(source="parquet", path=str(tmp_path)))


def test_an_unknown_split_is_refused_with_those_there_are(rows, tmp_path):
    _huggingface(tmp_path, rows)
    with pytest.raises(DataError, match="its splits are train, test"):
        build_source(CollectConfig(source="huggingface", path=str(tmp_path), split="validation"))


def test_class_labels_become_captions(rows, tmp_path):
    data = datasets.Dataset.from_list([{"image": row["image"], "label": n % 2} for n, row in enumerate(rows)])
    data.cast_column("label", datasets.ClassLabel(names=["temple", "orange_flower"])).save_to_disk(tmp_path)
    source = build_source(CollectConfig(source="huggingface", path=str(tmp_path), captions={"label": 1.0}))
    captions = [example.captions for unit in source.units() for example in source.read(unit)]
    assert captions[:2] == [(("a photo of a temple", 1.0),), (("a photo of an orange flower", 1.0),)]


def test_captions_are_found_by_the_conventions_of_each_source(rows, tmp_path):
    for row in rows:
        (tmp_path / f"{row['key']}.jpg").write_bytes(row["image"])
        (tmp_path / f"{row['key']}.txt").write_text(f" beside\n{row['key']} ")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(pathlib.Path(tmp_path).glob("temple_*")):
            tar.add(path, path.name)
    for config, count in ((CollectConfig(path=str(tmp_path)), 10), (CollectConfig("tar", str(tmp_path)), 5)):
        source = build_source(config)
        examples = [example for unit in source.units() for example in source.read(unit)]
        assert len(examples) == count
        for example in examples:
            assert example.captions == ((f"beside {example.id.split('/')[-1].removesuffix('.jpg')}", 1.0),)
