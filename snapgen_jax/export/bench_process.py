"""One measurement of one `.tflite` file, in a process that holds Python, numpy and LiteRT alone.

Run as a script: a job as JSON comes by standard input, and what was measured is the last line of standard output.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

if __package__:
    from snapgen_jax.export.runtime import compiled
else:  # a script, beside it
    from runtime import compiled  # type: ignore[import-not-found]


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Loads a file and calls it.

    Args:
        job: "path", "signature", "accelerator" ("cpu" or "gpu"), "threads", "runs", "seconds" (no call begins after so
            many), and "inputs": `{name: {"shape", "dtype", "file"}}`, the last a .npy file or None for ones.

    Returns:
        "load_seconds"; "first_seconds", of the first call; "seconds", of each further one; "process_bytes" before
        loading and "peak_bytes" at the end, of memory; "whole", whether every operator ran on the accelerator.
    """
    import ai_edge_litert.compiled_model  # noqa: F401 (before memory and time are taken)

    given = {name: _array(**described) for name, described in job["inputs"].items()}
    process = _memory("VmRSS")
    start = time.perf_counter()
    model = compiled(job["path"], job["accelerator"], job["threads"])
    index = list(model.get_signature_list()).index(job["signature"])
    names = model.get_signature_list()[job["signature"]]
    inputs, outputs = model.create_input_buffers(index), model.create_output_buffers(index)
    loaded = time.perf_counter() - start

    def call() -> float:
        """Seconds from arrays to arrays, as a client calls it."""
        begin = time.perf_counter()
        for name, buffer in zip(names["inputs"], inputs, strict=True):
            buffer.write(given[name])
        model.run_by_index(index, inputs, outputs)
        for name, buffer in zip(names["outputs"], outputs, strict=True):
            buffer.read(sizes[name][0], sizes[name][1])
        return time.perf_counter() - begin

    details = model.get_output_tensor_details(job["signature"])
    sizes = {name: (int(np.prod(d["shape"])), np.dtype(d["dtype"]).type) for name, d in details.items()}
    first, seconds, until = call(), [], time.perf_counter() + job["seconds"]
    while len(seconds) < job["runs"] and (not seconds or time.perf_counter() < until):
        seconds.append(call())
    return {
        "load_seconds": loaded,
        "first_seconds": first,
        "seconds": seconds,
        "process_bytes": process,
        "peak_bytes": _memory("VmHWM"),
        "whole": bool(model.is_fully_accelerated()),
    }


def _array(shape: list[int], dtype: str, file: str | None) -> np.ndarray:
    return np.ascontiguousarray(np.load(file, allow_pickle=False) if file else np.ones(shape, dtype))


def _memory(name: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def undelegated(path: str) -> dict[str, int]:
    """{operator: nodes} of a file that XNNPACK, the delegate of LiteRT's CPU, leaves to plain kernels."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path)
    interpreter.allocate_tensors()
    nodes = interpreter._get_ops_details()
    delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
    makes = {int(tensor): node for node in nodes if node["op_name"] != "DELEGATE" for tensor in node["outputs"]}
    inside: set[int] = set()
    for delegate in delegates:  # back from what a delegate makes to what it is given
        given, left = set(map(int, delegate["inputs"])), list(map(int, delegate["outputs"]))
        while left:
            tensor = left.pop()
            node = makes.get(tensor)
            if node is None or tensor in given or node["index"] in inside:
                continue
            inside.add(node["index"])
            left += [int(t) for t in node["inputs"] if int(t) >= 0]
    found: dict[str, int] = {}
    for node in nodes:
        if node["op_name"] != "DELEGATE" and node["index"] not in inside:
            found[node["op_name"]] = found.get(node["op_name"], 0) + 1
    return found


if __name__ == "__main__":
    said = json.load(sys.stdin)
    result = undelegated(said["path"]) if said.get("what") == "undelegated" else measure(said)
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a driver's own threads may crash while the process ends; nothing of that is a result
