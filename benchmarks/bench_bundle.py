"""`snapgen bench` held against `litert-benchmark`, the tool that comes with LiteRT, on the same files.

    python -m benchmarks.bench_bundle --bundle=quickstart/export/bundle
    python -m benchmarks.bench_bundle --bundle=quickstart/export/bundle --save=cpu2   # adds to benchmarks/results/

Both take turns, on one thread; one JSON line a file: the median of each tool's own medians, in milliseconds, and their
ratio. LiteRT's tool times a call without the copies of inputs and outputs, which ours includes, as a client has them;
it rounds to a hundredth of a millisecond, so that units below a tenth are left out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks.measuring import append, commit, machine
from snapgen_jax.export.bench import Asked, bench
from snapgen_jax.export.client import Bundle


def theirs(path: pathlib.Path, runs: int) -> float:
    """The median latency by LiteRT's tool, in milliseconds."""
    tool = pathlib.Path(sys.executable).parent / "litert-benchmark"
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        command = [tool, f"--model={path}", f"--num_runs={runs}", "--num_threads=1", f"--result_json={result}"]
        subprocess.run(command, capture_output=True, check=True)
        return float(json.loads(result.read_text())["latency"]["median_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=100, help="calls in each (default: %(default)s)")
    parser.add_argument("--save", default="", help="name of the machine, for benchmarks/results/")
    options = parser.parse_args()
    bundle = Bundle(options.bundle)
    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for unit, described in bundle.manifest["units"].items():
            for precision in bundle.manifest["precisions"]:
                asked = Asked([precision], [unit], threads=(1,), runs=options.runs, rounds=1)
                (row,) = bench(options.bundle, asked)["rows"]
                found = times.setdefault((unit, precision), {"ours": [], "theirs": []})
                found["ours"].append(row["ms"])
                found["theirs"].append(theirs(bundle.file(described["files"][precision]), options.runs))
    place = {"machine": machine(), "commit": commit(), "rounds": options.rounds, "runs": options.runs}
    for (unit, precision), found in times.items():
        ours, others = (float(np.median(found[name])) for name in ("ours", "theirs"))
        if others < 0.1:
            continue
        least = {f"{name}_least": round(min(values), 4) for name, values in found.items()}
        figures = {"ours_ms": round(ours, 4), "litert_benchmark_ms": round(others, 4), "ratio": round(ours / others, 3)}
        append({"unit": unit, "precision": precision, **figures, **least, **place}, "bench_bundle", options.save)


if __name__ == "__main__":
    main()
