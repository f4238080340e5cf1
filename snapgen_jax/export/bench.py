"""How fast a bundle's files load and run on this machine, and how much memory they take.

Each measurement is a process of its own, and all of them take turns, round after round: a machine that does other work
is slower for minutes at a time, and then it is so for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from snapgen_jax.bounds import at_least, check
from snapgen_jax.export import bench_process
from snapgen_jax.export.client import Bundle
from snapgen_jax.export.compat import GPU_OPERATORS
from snapgen_jax.export.flatbuffer import Operator, describe
from snapgen_jax.export.manifest import versions
from snapgen_jax.export.runtime import AcceleratorError, GPURunError, drivers, see_drivers

Accelerator = Literal["cpu", "gpu"]
SECONDS = 20.0  # no call of a measurement begins after so many
Numbers = dict[str, Any]


class BenchError(ValueError):
    """What was asked for is not in the bundle. Says what is."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        precisions, units: None for all of the bundle.
        accelerators: of "cpu" and "gpu".
        threads: of LiteRT's CPU kernels, one measurement for each. The GPU is measured with the first alone.
        runs: calls of a measurement after the first, as many as fit into 20 seconds.
        rounds: how often each is measured.
        size: (height, width) of the images, where the bundle has several; None for its own.
    """

    precisions: Sequence[str] | None = None
    units: Sequence[str] | None = None
    accelerators: Sequence[Accelerator] = ("cpu",)
    threads: Sequence[int] = (1, 2)
    runs: int = 50
    rounds: int = 3
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check(self, threads=at_least(1), runs=at_least(1), rounds=at_least(1))


def bench(
    folder: str | pathlib.Path,
    asked: Asked,
    say: Callable[[str], None] | None = None,
    cache: str | pathlib.Path | None = None,
) -> Numbers:
    """Measures a bundle.

    Args:
        folder: of the bundle.
        asked: what to measure.
        say: is told a line after each round.
        cache: the folder of unpacked networks, see `client.Bundle`.

    Returns:
        "machine", "bundle", "versions"; "rows", a measurement each, with "unit", "precision", "accelerator", "threads",
        and either "error" or "load_ms" (median of the rounds), "ms" (median of all calls of all rounds), "ms_quartiles"
        (a quarter of the calls was faster, a quarter slower), "ms_least", "calls", "process_bytes" (Python, numpy and
        LiteRT before the file is loaded), "peak_bytes", "whole" (all operators ran on the GPU); and "files", see
        `describe_file`.

    Raises:
        BenchError: the bundle has no such precision or unit, or there is no such accelerator.
        BundleError: this is no bundle, or one without the size.
    """
    bundle = Bundle(folder, asked.size, cache=cache)
    units = _known("unit", asked.units, bundle.manifest["units"])
    precisions = _known("precision", asked.precisions, bundle.manifest["precisions"])
    accelerators = _known("accelerator", asked.accelerators, ("cpu", "gpu"))
    rows: list[Numbers] = [
        {"unit": unit, "precision": precision, "accelerator": accelerator, "threads": threads}
        for unit in units
        for precision in precisions
        for accelerator in accelerators
        for threads in (asked.threads if accelerator == "cpu" else asked.threads[:1])
    ]
    measured: list[list[Numbers]] = [[] for _ in rows]
    for turn in range(asked.rounds):
        for row, found in zip(rows, measured, strict=True):
            if "error" not in row:
                try:
                    found.append(_measure(bundle, row, asked.runs))
                except AcceleratorError as error:
                    row["error"] = str(error)
        if say is not None:
            say(f"round {turn + 1} of {asked.rounds}")
    for row, found in zip(rows, measured, strict=True):
        if "error" not in row:
            row |= _summary(found)
    files = [describe_file(bundle, unit, precision) for unit in units for precision in precisions]
    place = {"machine": _machine(), "bundle": pathlib.Path(folder).name, "versions": versions()}
    return {**place, "rows": rows, "files": files}


def describe_file(bundle: Bundle, unit: str, precision: str) -> Numbers:
    """What a file's graph says of its speed.

    Returns:
        "unit", "precision", "bytes", "macs"; "operators", `{operator: {"nodes", "macs", "written"}}`, shares of all
        multiplications and of all numbers that are written, counted in the graph and not timed (LiteRT's Python has no
        profiler); "off_cpu_delegate", `{operator: nodes}` that XNNPACK leaves to plain kernels; "off_gpu", those that
        are not in the list of what the GPU accelerator takes.
    """
    path = bundle.network_file(unit, precision)
    described = describe(path)
    graph = described.graphs[bundle.manifest["units"][unit]["signature"]]
    operators = [operator for operator in described.operators if operator.graph == graph]
    total_macs = sum(map(macs, operators))
    total_written = sum(map(_written, operators))
    found: dict[str, Numbers] = {}
    for operator in operators:
        row = found.setdefault(operator.name, {"nodes": 0, "macs": 0.0, "written": 0.0})
        row["nodes"] += 1
        row["macs"] += macs(operator) / max(total_macs, 1)
        row["written"] += _written(operator) / max(total_written, 1)
    said = _process({"what": "undelegated", "path": str(path)})
    return {
        "unit": unit,
        "precision": precision,
        "bytes": path.stat().st_size,
        "macs": total_macs,
        "operators": dict(sorted(found.items(), key=lambda item: (-item[1]["macs"], -item[1]["written"]))),
        "off_cpu_delegate": said,
        "off_gpu": {name: row["nodes"] for name, row in found.items() if name not in GPU_OPERATORS},
    }


def macs(operator: Operator) -> int:
    """Multiplications with an addition that an operator asks for; 0 of all but products and convolutions."""
    out = math.prod(operator.outputs[0].shape)
    if len(operator.inputs) < 2:
        return 0
    first, second = operator.inputs[0].shape, operator.inputs[1].shape
    if operator.name in ("CONV_2D", "FULLY_CONNECTED"):  # weights [out, kh, kw, in], or [out, in]
        return out * math.prod(second[1:])
    if operator.name == "DEPTHWISE_CONV_2D":  # [1, kh, kw, out]
        return out * math.prod(second[1:3])
    if operator.name == "BATCH_MATMUL":
        return out * math.prod(first) // max(math.prod(operator.outputs[0].shape[:-1]), 1)
    if operator.name == "TRANSPOSE_CONV" and len(operator.inputs) > 2:  # (output shape, weights, x)
        pixels = operator.inputs[2].shape
        return math.prod(pixels) * math.prod(second) // max(pixels[-1], 1)
    return 0


def _written(operator: Operator) -> int:
    """Numbers that an operator writes in each call; what is made of constants alone is made once."""
    if all(tensor.constant for tensor in operator.inputs):
        return 0
    return sum(math.prod(tensor.shape) for tensor in operator.outputs)


def _known(what: str, asked: Sequence[str] | None, known: Any) -> list[str]:
    if unknown := [name for name in asked or () if name not in known]:
        raise BenchError(f"no {what} {unknown[0]!r} to measure; there is {', '.join(known)}")
    return list(dict.fromkeys(asked)) if asked else list(known)


def _measure(bundle: Bundle, row: Numbers, runs: int) -> Numbers:
    """One measurement, in a process of its own."""
    unit = bundle.manifest["units"][row["unit"]]
    job = {
        "path": str(bundle.network_file(row["unit"], row["precision"])),
        "signature": unit["signature"],
        "accelerator": row["accelerator"],
        "threads": row["threads"],
        "runs": runs,
        "seconds": SECONDS,
        "inputs": {
            name: {"shape": tensor["shape"], "dtype": tensor["dtype"], "file": _recorded(bundle, row["unit"], name)}
            for name, tensor in unit["inputs"].items()
        },
    }
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        if row["accelerator"] == "gpu":
            see_drivers(environment, drivers(software_first=False), stack)
        return _process(job, environment)


def _recorded(bundle: Bundle, unit: str, name: str) -> str | None:
    """The file of a recorded input, where the bundle has one; older ones do not."""
    path = bundle.folder / bundle.golden_folder / "self_test" / unit / "inputs" / f"{name}.npy"
    return str(path) if path.is_file() else None


def _process(job: Numbers, environment: dict[str, str] | None = None) -> Numbers:
    done = subprocess.run(
        [sys.executable, str(bench_process.__file__)],
        input=json.dumps(job), env=environment, capture_output=True, text=True, check=False, errors="replace",
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        raise GPURunError(f"{job['path']}: {last[:300]}")
    return json.loads(lines[-1])


def _summary(rounds: Sequence[Numbers]) -> Numbers:
    every = 1e3 * np.concatenate([found["seconds"] for found in rounds])
    low, middle, high = np.quantile(every, (0.25, 0.5, 0.75))
    return {
        "load_ms": float(np.median([1e3 * found["load_seconds"] for found in rounds])),
        "first_ms": float(np.median([1e3 * found["first_seconds"] for found in rounds])),
        "ms": float(middle),
        "ms_quartiles": [float(low), float(high)],
        "ms_least": float(every.min()),
        "calls": len(every),
        "process_bytes": max(found["process_bytes"] for found in rounds),
        "peak_bytes": max(found["peak_bytes"] for found in rounds),
        "whole": all(found["whole"] for found in rounds),
    }


def _machine() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {len(named) or '?'} CPU cores, {platform.system()}"


def table(found: Numbers) -> str:
    """The measurements as text."""
    head = ["unit", "precision", "on", "threads", "load ms", "ms a call", "quartiles", "least", "peak MB"]
    lines = [head]
    for row in found["rows"]:
        begin = [row["unit"], row["precision"], row["accelerator"], str(row["threads"])]
        if "error" in row:
            lines.append([*begin, row["error"]])
            continue
        low, high = row["ms_quartiles"]
        spread = f"{short(low)} to {short(high)}"
        times = (f"{row['load_ms']:.0f}", short(row["ms"]), spread, short(row["ms_least"]))
        lines.append([*begin, *times, f"{row['peak_bytes'] / 1e6:.0f}"])
    widths = [max(len(line[i]) for line in lines if len(line) == len(head)) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in lines]
    process = [row["process_bytes"] for row in found["rows"] if "error" not in row]
    if process:
        text += ["", f"Of the peak, Python, numpy and LiteRT take {max(process) / 1e6:.0f} MB."]
    for unit in dict.fromkeys(file["unit"] for file in found["files"]):
        files = [file for file in found["files"] if file["unit"] == unit]
        text += ["", f"{unit}: {files[0]['macs']:,} multiplications. By operator, counted in the graph and not timed:"]
        most = [(n, row) for n, row in files[0]["operators"].items() if row["macs"] >= 0.01 or row["written"] >= 0.05]
        text += [
            f"  {name:20} {row['nodes']:4} nodes, {row['macs']:4.0%} of the multiplications, "
            f"{row['written']:4.0%} of the numbers written"
            for name, row in most
        ]
        for name, place in (("off_cpu_delegate", "XNNPACK"), ("off_gpu", "the list of the GPU accelerator")):
            text += [
                f"  {file['precision']}: outside {place}: "
                + ", ".join(f"{kind} x {n}" for kind, n in file[name].items())
                for file in files
                if file[name]
            ]
    return "\n".join(line.rstrip() for line in text)


def short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
