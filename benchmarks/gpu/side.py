"""What the processes of both frameworks share: how a call is timed, and the lines they print. Imports neither."""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Line = dict[str, Any]
MARK = "@line "  # before every line of results on standard output, where libraries print too


def timed(call: Callable[[], Any], wait: Callable[[Any], Any], seconds: float, rounds: int = 3) -> Line:
    """Milliseconds of a call when many follow each other, and of one that is waited for.

    Args:
        call: starts the work.
        wait: waits for what a call returned.
        seconds: of each of the rounds, about.
    """
    for _ in range(2):
        wait(call())
    start = time.perf_counter()
    wait(call())
    count = max(2, min(1000, int(seconds / (time.perf_counter() - start + 1e-9))))
    each, single = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count - 1):
            call()
        wait(call())
        each.append(1e3 * (time.perf_counter() - start) / count)
    for _ in range(min(count, 50)):
        start = time.perf_counter()
        wait(call())
        single.append(1e3 * (time.perf_counter() - start))
    return {
        "ms": statistics.median(each),
        "ms_min": min(each),
        "ms_max": max(each),
        "calls": rounds * count,
        "latency_ms": statistics.median(single),
    }


def first(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Seconds of a call that compiles."""
    start = time.perf_counter()
    wait(call())
    return time.perf_counter() - start


def serve(
    framework: str, versions: Mapping[str, str], begin: Callable[[Line], Callable[[Line], Iterable[Line]]]
) -> None:
    """Measures the rows that standard input asks for, and prints a line for each result, as it is made.

    Args:
        framework: "jax" or "torch".
        versions: of what computes.
        begin: of the task, a function that measures a row; it yields what it found, in parts.
    """
    task = json.load(sys.stdin)
    about = {"framework": framework, "versions": dict(versions)}
    try:
        measure = begin(task)
    except Exception as error:
        traceback.print_exc()
        for row in task["rows"]:
            _print({"row": row["name"], **about, "error": _said(error)})
            _print({"finished": row["name"]})
        return
    for row in task["rows"]:
        facts = {"row": row["name"], **about, "batch": row["batch"], "side": row["side"]}
        try:
            for found in measure(row):
                _print({**facts, **found})
        except Exception as error:
            traceback.print_exc()
            _print({**facts, "error": _said(error)})
        _print({"finished": row["name"]})


def rates(row: Line, ms: float, matmul_tflop_s: float) -> Line:
    """Images a second, and the share of the card's matrix rate that the counted arithmetic takes."""
    found = {"images_per_s": 1e3 * row["batch"] / ms, "matmul_tflop_s": matmul_tflop_s}
    if row["tflop"]:
        rate = 1e3 * row["tflop"] / ms
        found |= {"tflop": row["tflop"], "tflop_s": rate, "share_of_matmul": rate / matmul_tflop_s}
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def _print(line: Line) -> None:
    rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()}
    print(MARK + json.dumps(rounded), flush=True)
