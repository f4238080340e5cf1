"""How much memory a bundle's files take on this machine: the peak of a process that loads and runs them.

Run as a script, so that the process holds Python, numpy and LiteRT alone; each measurement is a child of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# {unit: {"path", "signature", "inputs": {name: (shape, dtype)}}}
Files = Mapping[str, Mapping[str, Any]]


class MeasurementError(RuntimeError):
    """A file could not be loaded or run."""


def measure(files: Mapping[str, Files]) -> dict[str, Any]:
    """The peaks, in bytes, of the files of each precision.

    Args:
        files: `{precision: {unit: {"path", "signature", "inputs": {name: (shape, dtype)}}}}`.

    Returns:
        "process": what Python, numpy and LiteRT take by themselves; and for each precision `{"units": {unit: peak},
        "loaded": {unit: what it holds after its first call, the process left out}, "in_turn", "together"}`, the last
        two of a process that loads, runs and frees one file after the other, and of one that holds all.

    Raises:
        MeasurementError: a file could not be run.
    """
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(files), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MeasurementError((done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _measure(files: Mapping[str, Files]) -> dict[str, Any]:
    from ai_edge_litert.interpreter import Interpreter

    def load(unit: Mapping[str, Any], loaded: dict[str, Any]) -> Callable[[], Any]:
        if unit["path"] not in loaded:  # one interpreter for all signatures of a file, as in a client
            loaded[unit["path"]] = Interpreter(model_path=unit["path"])
        run = loaded[unit["path"]].get_signature_runner(unit["signature"])
        given = {name: np.zeros(shape, dtype) for name, (shape, dtype) in unit["inputs"].items()}
        return lambda: run(**given)

    def in_turn(units: Files) -> None:
        for path in dict.fromkeys(unit["path"] for unit in units.values()):
            together({name: unit for name, unit in units.items() if unit["path"] == path})

    def together(units: Files) -> None:
        loaded: dict[str, Any] = {}
        for run in [load(unit, loaded) for unit in units.values()]:
            run()

    def held(unit: Mapping[str, Any]) -> Any:
        run = load(unit, {})
        run()
        return run

    found: dict[str, Any] = {"process": _measured(lambda: None, _peak)}
    empty = _measured(lambda: None, _resident)
    for precision, units in files.items():
        found[precision] = {
            "units": {name: _measured(lambda unit=unit: held(unit), _peak) for name, unit in units.items()},
            "loaded": {
                name: max(0, _measured(lambda unit=unit: held(unit), _resident) - empty) for name, unit in units.items()
            },
            "in_turn": _measured(lambda units=units: in_turn(units), _peak),
            "together": _measured(lambda units=units: together(units), _peak),
        }
    return found


def _peak() -> int:
    """The most memory, in bytes, that this process has held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB


def _resident() -> int:
    """The memory, in bytes, that this process holds now; the most so far where the system does not say."""
    if not sys.platform.startswith("linux"):
        return _peak()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _measured(work: Callable[[], Any], read: Callable[[], int]) -> int:
    """What `read` finds in a child process after some work, whose result is still held."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reader)
            kept = work()
            os.write(writer, str(read()).encode())
            del kept
            status = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        raise SystemExit(1)  # the child has said why
    return int(said)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(json.load(sys.stdin))) + "\n")
