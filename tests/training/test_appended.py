"""A file of segments is the file that appending would give, whatever is ended between two writes."""

import itertools

import pytest
from etils import epath

from snapgen_jax.training import appended
from snapgen_jax.training.appended import AppendedFile, read_appended
from snapgen_jax.training.exits import DamagedError

LINES = [f"line {number}\n".encode() for number in range(300)]


@pytest.fixture
def stored(monkeypatch):
    """Takes every path for an object's: a store in which a disk's files are the objects."""
    monkeypatch.setattr(appended, "on_object_store", lambda path: True)


def append_all(path, lines):
    file = AppendedFile(path)
    for line in lines:
        file.append(line)
    return file


def test_segments_are_the_bytes_in_order_few_and_each_written_few_times(tmp_path, stored, monkeypatch):
    written, write = [], appended.write_whole
    monkeypatch.setattr(appended, "write_whole", lambda path, data: written.append(len(data)) or write(path, data))
    append_all(tmp_path / "train.jsonl", LINES)
    assert read_appended(tmp_path / "train.jsonl") == b"".join(LINES)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "train.jsonl.000000000000-000000002194.2"
    assert len(names) == 1 + 300 % 256 // 16 + 300 % 16
    assert b"".join((tmp_path / name).read_bytes() for name in names) == b"".join(LINES)
    assert sum(written) < 3 * len(b"".join(LINES))


def test_no_merge_is_larger_than_its_limit_and_bytes_written_grow_linearly(tmp_path, stored, monkeypatch):
    monkeypatch.setattr(appended, "LARGEST_MERGE", 600)
    append_all(tmp_path / "log", LINES)
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 600
    assert read_appended(tmp_path / "log") == b"".join(LINES)


@pytest.mark.parametrize("length", [0, 1, 100, 149, 150, 2193, 2194, 2195, 2400, len(b"".join(LINES))])
def test_a_file_that_was_cut_goes_on_from_there(tmp_path, stored, length):
    path = tmp_path / "log"
    append_all(path, LINES).cut(length)
    whole = b"".join(LINES)[:length]
    assert read_appended(path) == whole
    file = append_all(path, LINES[:40])
    assert read_appended(path) == whole + b"".join(LINES[:40])
    file.append(b"")
    assert read_appended(path) == whole + b"".join(LINES[:40])


class Killed(Exception):
    pass


def lives(monkeypatch, operations):
    """Ends the process, as it were, before operation number `operations` on the store."""
    count = itertools.count()

    def guarded(function):
        def run(*arguments, **keywords):
            if next(count) == operations:
                raise Killed
            return function(*arguments, **keywords)

        return run

    monkeypatch.setattr(appended, "write_whole", guarded(appended.write_whole))
    monkeypatch.setattr(type(epath.Path("/")), "unlink", guarded(type(epath.Path("/")).unlink))


def test_a_process_killed_before_any_operation_leaves_whole_lines_none_twice_and_none_missing(tmp_path, stored):
    for operations in itertools.count():
        path, sent = tmp_path / f"log{operations}", 0
        with pytest.MonkeyPatch.context() as patch:
            lives(patch, operations)
            try:
                file = AppendedFile(path)
                for sent in range(40):
                    file.append(LINES[sent])
                sent = 40
                file.cut(len(b"".join(LINES[:18])))
                break
            except Killed:
                pass
        left = read_appended(path)
        count = left.count(b"\n")
        assert left == b"".join(LINES[:count])
        assert count in ({sent, sent + 1} if sent < 40 else set(range(18, 41)))
        kept = min(count, 9)
        AppendedFile(path).cut(len(b"".join(LINES[:kept])))
        append_all(path, LINES[kept:60])
        assert read_appended(path) == b"".join(LINES[:60])
    assert operations > 60


def test_a_missing_segment_is_named(tmp_path, stored):
    append_all(tmp_path / "log", LINES[:5])
    (tmp_path / "log.000000000007-000000000014.0").unlink()
    with pytest.raises(DamagedError, match=r"lacks its bytes 7 to 14: a segment log.000000000007-\.\.\. was deleted"):
        read_appended(tmp_path / "log")


def test_a_merge_between_listing_and_reading_is_read_again(tmp_path, stored, monkeypatch):
    append_all(tmp_path / "log", LINES[:15])
    listed = appended._listed

    def meanwhile(path):
        segments = listed(path)
        monkeypatch.setattr(appended, "_listed", listed)
        append_all(path, LINES[15:16])
        return segments

    monkeypatch.setattr(appended, "_listed", meanwhile)
    assert read_appended(tmp_path / "log") == b"".join(LINES[:16])


def test_a_workdir_copied_from_a_store_to_a_disk_and_back_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "log"
    for number, on_store in enumerate([True, False, True, False]):
        monkeypatch.setattr(appended, "on_object_store", lambda path, on_store=on_store: on_store)
        assert read_appended(path) == b"".join(LINES[: 20 * number])
        append_all(path, LINES[20 * number : 20 * number + 20])
        assert path.exists() == (not on_store)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log"]
    assert path.read_bytes() == b"".join(LINES[:80])
