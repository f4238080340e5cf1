"""How long the step of each bucket took to compile when a workdir last did so, and a word before it starts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator

from etils import epath

from snapgen_jax.training.files import write_whole
from snapgen_jax.training.progress import duration


class CompileTimes:
    """The seconds of the last compilation by bucket, kept in a file between restarts."""

    def __init__(self, path: epath.Path | None):
        """`path`: of the file; None keeps nothing. One that is damaged counts as none: it says times alone."""
        self._path = path
        self._seconds: dict[str, float] = {}
        if path is not None and path.exists():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                self._seconds = {str(bucket): float(s) for bucket, s in json.loads(path.read_text()).items()}

    @contextlib.contextmanager
    def timed(self, bucket: str, say: Callable[[str], None]) -> Iterator[None]:
        """Says what is compiled and how long it took the last time; then how long it took, and keeps that."""
        last = f" ({duration(self._seconds[bucket])} last time)" if bucket in self._seconds else ""
        say(f"compiling the step of bucket {bucket!r}{last} ...")
        began = time.monotonic()
        yield
        self._seconds[bucket] = time.monotonic() - began
        say(f"compiled the step of bucket {bucket!r} in {duration(self._seconds[bucket])}")
        if self._path is not None:
            write_whole(self._path, json.dumps(self._seconds))
