"""Files that grow at their end: on a disk a file, on an object store, where nothing can be appended, segments.

A segment is an object beside the place where the file would be, and holds the bytes from `begin` to `end`:

    metrics/train.jsonl.000000000000-000000020480.1
    metrics/train.jsonl.000000020480-000000021760.0      <path>.<begin>-<end>.<level>

An append writes one new object. Where 15 segments of its level stand at the end, the new object takes them in and is of
the next level, and they are deleted. So 16^k appends leave at most 15 k objects, and a byte is written at most k + 1
times; since no merge exceeds 64 MiB, bytes written grow linearly.

An object is there when all of it is. A segment that lies within another one holds the same bytes and is passed over:
that is what a merge leaves that a crash ended between writing and deleting.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import time

from etils import epath

from snapgen_jax.training.exits import DamagedError
from snapgen_jax.training.files import on_object_store, write_whole

FAN_IN = 16
LARGEST_MERGE = 2**26
_TRIES = 5


@dataclasses.dataclass(frozen=True)
class _Segment:
    begin: int
    end: int
    level: int

    def path(self, of: epath.Path) -> epath.Path:
        return of.with_name(f"{of.name}.{self.begin:012d}-{self.end:012d}.{self.level}")


def read_appended(path: epath.PathLike) -> bytes:
    """The bytes of such a file, in either form; none where there is no file.

    A disk's file is read before segments, which were then copied there; on an object store segments come first.

    Raises:
        DamagedError: a segment is missing.
    """
    path = epath.Path(path)
    for attempt in itertools.count(1):
        try:
            whole = path.exists()
            if whole and not on_object_store(path):
                return path.read_bytes()
            segments = _in_a_row(path, _listed(path))
            if segments or not whole:
                return b"".join(segment.path(path).read_bytes() for segment in segments)
            return path.read_bytes()
        except FileNotFoundError:  # merged by a running writer since it was listed
            if attempt == _TRIES:
                raise
            time.sleep(0.1 * attempt)
    raise AssertionError("unreachable")


class AppendedFile:
    """The one writer of such a file. A form that was copied from another kind of place is rewritten first."""

    def __init__(self, path: epath.PathLike):
        """Finds what is there and tidies up after a crash.

        Raises:
            DamagedError: a segment is missing.
        """
        self.path = epath.Path(path)
        self._stored = on_object_store(self.path)
        listed = _listed(self.path)
        self._segments = _in_a_row(self.path, listed) if self._stored else []
        if self._stored:
            if not self._segments and self.path.exists():
                self._write(_Segment(0, len(data := self.path.read_bytes()), 0), data)
            self.path.unlink(missing_ok=True)
        elif listed and not self.path.exists():
            write_whole(self.path, read_appended(self.path))
        self._delete(segment for segment in listed if segment not in self._segments)

    def append(self, data: bytes) -> None:
        """Appends bytes; when it returns they are on the disk or in the store."""
        if not data:
            return
        if not self._stored:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return
        merged, level = self._to_merge(len(data))
        begin = merged[0].begin if merged else self._end
        end = self._end + len(data)
        earlier = b"".join(segment.path(self.path).read_bytes() for segment in merged)
        self._write(_Segment(begin, end, level), earlier + data)
        self._delete(merged)

    def cut(self, length: int) -> None:
        """Keeps the first `length` bytes, at most all there are."""
        if not self._stored:
            data = read_appended(self.path)
            if len(data) > length:
                write_whole(self.path, data[:length])
            return
        before = self._segments
        self._segments = [segment for segment in before if segment.end <= length]
        later = before[len(self._segments) :]
        if later and later[0].begin < length:
            first = later[0]
            data = first.path(self.path).read_bytes()[: length - first.begin]
            self._write(_Segment(first.begin, length, first.level), data)
        self._delete(reversed(later))  # the last first, so that no gap is ever seen

    @property
    def _end(self) -> int:
        return self._segments[-1].end if self._segments else 0

    def _to_merge(self, size: int) -> tuple[list[_Segment], int]:
        """The segments at the end that a new one of `size` bytes takes in, and its level."""
        kept, merged, level = list(self._segments), [], 0
        while True:
            same = list(itertools.takewhile(lambda s, level=level: s.level == level, reversed(kept)))[::-1]
            total = size + self._end - (same[0].begin if same else self._end)
            if len(same) < FAN_IN - 1 or total > LARGEST_MERGE:
                return merged, level
            kept, merged, level = kept[: len(kept) - len(same)], same + merged, level + 1

    def _write(self, segment: _Segment, data: bytes) -> None:
        write_whole(segment.path(self.path), data)
        self._segments = [s for s in self._segments if s.end <= segment.begin] + [segment]

    def _delete(self, segments) -> None:
        for segment in segments:
            segment.path(self.path).unlink(missing_ok=True)


def _listed(path: epath.Path) -> list[_Segment]:
    """The segments that there are, in any order."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d{12})-(\d{12})\.(\d+)")
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except FileNotFoundError:
        return []
    return [_Segment(*map(int, found.groups())) for name in names if (found := pattern.fullmatch(name))]


def _in_a_row(path: epath.Path, segments: list[_Segment]) -> list[_Segment]:
    """The segments that make the file, each beginning where the one before ends."""
    row: list[_Segment] = []
    for segment in sorted(segments, key=lambda s: (s.begin, -s.end, -s.level)):
        end = row[-1].end if row else 0
        if segment.begin == end and segment.end > end:
            row.append(segment)
        elif segment.end > end:
            raise DamagedError(
                f"{path} lacks its bytes {end} to {segment.begin}: a segment {path.name}.{end:012d}-... was deleted; "
                f"restore it, or delete {segment.path(path).name} and what follows"
            )
    return row
