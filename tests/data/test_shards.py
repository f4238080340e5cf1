"""Records, shards and their manifest."""

import pickle

import ml_dtypes
import numpy as np
import pytest

from snapgen_jax.data import records, shards
from snapgen_jax.data.errors import DataError


def _example(number: int) -> dict:
    return {
        "id": f"photo {number}",
        "image": bytes([number, 255, 0]),
        "captions": ["a red circle", "ein roter Kreis ü"],
        "latent": np.full((2, 3, 4), number, ml_dtypes.bfloat16),
        "tokens": np.arange(number, number + 5, dtype=np.int32),
        "aesthetic": 5.25,
        "height": np.int32(number),
        "score": np.float64(0.1),
    }


def _assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        if isinstance(a[name], np.ndarray | np.generic):
            assert a[name].dtype == b[name].dtype


@pytest.fixture
def folder(tmp_path):
    written = [
        shards.write_shard(
            tmp_path, shards.shard_name("256x256", k, 2), map(_example, range(3 * k, 3 * k + 3)), "256x256"
        )
        for k in range(2)
    ]
    shards.Manifest("encoded", {"latent": shards.StoredArray("bfloat16", (2, 3, 4))}, tuple(written)).write(tmp_path)
    return tmp_path


def test_an_example_comes_back_from_its_bytes():
    _assert_equal(_example(3), records.unpack(records.pack(_example(3))))


def test_equal_examples_are_equal_bytes_whatever_the_order_of_their_names():
    example = _example(1)
    assert records.pack(dict(reversed(example.items()))) == records.pack(example)


def test_a_value_that_is_neither_array_nor_text_is_refused():
    with pytest.raises(TypeError, match="object"):
        records.pack({"x": object()})


def test_bytes_that_hold_no_example_are_refused():
    for bad in (b"", b"\xc1", records.pack(_example(1))[:-5], b"\x05"):
        with pytest.raises(ValueError, match="holds no example"):
            records.unpack(bad)


def test_records_are_read_by_index_across_shards_and_processes(folder):
    manifest = shards.read_manifest(folder)
    reader = pickle.loads(pickle.dumps(shards.Records(folder, manifest.shards)))
    assert len(reader) == manifest.examples() == 6
    for number in (5, 0, 3):
        _assert_equal(_example(number), records.unpack(reader[number]))
    assert reader.name(4).endswith("256x256-00001-of-00002.array_record, record 1")


def test_the_manifest_comes_back_equal(folder):
    manifest = shards.read_manifest(folder)
    assert manifest.arrays["latent"] == shards.StoredArray("bfloat16", (2, 3, 4))
    again = folder / "again"
    manifest.write(again)
    assert shards.read_manifest(again) == manifest


def test_equal_examples_make_equal_files(tmp_path):
    a = shards.write_shard(tmp_path / "a", "x.array_record", map(_example, range(50)))
    b = shards.write_shard(tmp_path / "b", "x.array_record", map(_example, range(50)))
    assert a == b


def test_a_missing_and_a_truncated_shard_are_named(folder):
    manifest = shards.read_manifest(folder)
    shards.check_files(folder, manifest)
    second = folder / manifest.shards[1].file
    content = second.read_bytes()
    second.write_bytes(content[:-7])
    with pytest.raises(DataError, match=r"00001-of-00002.*cut or altered"):
        shards.check_files(folder, manifest)
    second.unlink()
    with pytest.raises(DataError, match=r"00001-of-00002.*missing"):
        shards.check_files(folder, manifest)


def test_a_shard_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def failing():
        yield _example(0)
        raise RuntimeError("this example has a fault of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        shards.write_shard(tmp_path, "x.array_record", failing())
    assert list(tmp_path.iterdir()) == []

    class Full(shards.ArrayRecordWriter):
        def write(self, record):
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(DataError, match="No space left on device"):
        shards.write_shard(tmp_path, "x.array_record", map(_example, range(2)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "no manifest"),
        ('{"schema": 99}', "version 99"),
        (
            '{"schema": 1, "kind": "encoded", "arrays": {}, "facts": {}, "shards": [{"file": "../x", "bucket": "", '
            '"examples": 1, "bytes": 1, "sha256": ""}]}',
            "leaves the folder",
        ),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, content, words):
    (tmp_path / shards.MANIFEST).write_text(content)
    with pytest.raises(DataError, match=words):
        shards.read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_not_done(tmp_path):
    with pytest.raises(DataError, match="has not ended"):
        shards.read_manifest(tmp_path)
