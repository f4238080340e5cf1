"""How a command ends: what an error means to the user, the exit code, and this process's part in a run of several."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from snapgen_jax.data.errors import DataError
from snapgen_jax.training.exits import ExitCode, RunError


def run_to_exit_code(command: str, run: Callable[[], None], given: Callable[[], Sequence[str]] = lambda: ()) -> int:
    """Runs a command, says what went wrong if something did, and ends this process's part in a run of several.

    Args:
        command: its name, for messages.
        run: the command.
        given: the paths that the user gave, asked for where a file cannot be used.
    """
    try:
        with _no_interrupt_lost():
            run()
    except (RunError, DataError, KeyboardInterrupt, OSError) as error:
        return _leave(*_explain(command, error, given))
    except Exception as error:
        cluster = _cluster()
        if cluster is None:
            raise
        traceback.print_exc()
        if type(error).__name__ == "JaxRuntimeError":
            cluster.explain_lost_peer()
        return _leave(1, traceback.format_exc())
    return _leave(ExitCode.DONE)


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Repeats a Ctrl-C that Python drops.

    After a long call of C++, such as a compilation, the first Python that runs is often a callback of the garbage
    collector, of which JAX has one. What such a callback raises is printed and ignored.
    """
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # From another thread, and later: here it would be dropped again. Where it is, this repeats itself.
            again.append(threading.Timer(0.1, _thread.interrupt_main))
            again[-1].start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = before


def _cluster() -> Any:
    """The other processes of this run, if it has any."""
    hosts = sys.modules.get("snapgen_jax.parallel.hosts")
    return None if hosts is None or hosts.current().count == 1 else hosts.current()


# What is wrong with a path, rather than with the file system that it is on.
_OF_PATHS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}


def _mistaken_path(error: OSError, given: Sequence[str]) -> str:
    """The path of an error, if it is one that the user gave, lies in it, or is a folder above it; else ""."""
    if error.errno not in _OF_PATHS:
        return ""
    for name in (error.filename, error.filename2):
        if not isinstance(name, str | os.PathLike):
            continue
        failed = pathlib.Path(os.path.abspath(name))
        for text in given:
            path = pathlib.Path(os.path.abspath(os.path.expanduser(text)))
            # A file that vanishes from a run is a file system's fault.
            inside = path in failed.parents and not (error.errno == errno.ENOENT and (path / "config.json").exists())
            if path == failed or inside or (failed in path.parents and os.sep in text):
                return str(name)
    return ""


def _explain(command: str, error: BaseException, given: Callable[[], Sequence[str]] = lambda: ()) -> tuple[int, str]:
    """Prints what an error means to the user; returns the exit code and what was printed."""
    code = error.code if isinstance(error, RunError) else ExitCode.INFRASTRUCTURE
    said = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if isinstance(error, DataError):
        code = ExitCode.BAD_CONFIG
    elif isinstance(error, OSError):
        if name := _mistaken_path(error, given()):
            code = ExitCode.BAD_CONFIG
            said = f"{name!r} cannot be used: {error.strerror}; give a path that exists, and that you may read or write"
        else:
            traceback.print_exc()
    text = f"snapgen {command}: {said}"
    print(text, file=sys.stderr, flush=True)
    return 130 if isinstance(error, KeyboardInterrupt) else int(code), text


def _leave(code: int, text: str = "") -> int:
    """Ends this process's part in a run of several: with the others if it went well, else it ends them too."""
    cluster = _cluster()
    if cluster is None:
        return int(code)
    if code in (ExitCode.DONE, ExitCode.PREEMPTED):
        cluster.leave()
        return int(code)
    cluster.fail(int(code), text)
    sys.stdout.flush()
    os._exit(int(code))
