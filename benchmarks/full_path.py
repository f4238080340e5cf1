"""The full path in small, whole, and killed at three random moments: does it end the same?

    python -m benchmarks.full_path --scratch=/tmp/full_path [--kills=3] [--seed=0]

Walks `configs/full_path.py:runlocal` twice, in processes of their own. The second is killed (SIGKILL, the whole group)
when a random share of the first one's time has gone by, and started again, three times, and then left to end. Compares
the files that a chain leaves: shards, weights and `.tflite` files byte by byte. Prints and stores one JSON object,
`results/full_path-NAME.json` with `--save=NAME`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from benchmarks.measuring import commit, machine

RESULTS = pathlib.Path(__file__).parent / "results"
COMPARED = ("collected/images/*.array_record", "encoded/*/*.array_record", "released/weights/*.safetensors")
COMPARED += ("released/bundle/*.tflite", "encoded/*/manifest.json")


def start(config: str, workdir: pathlib.Path) -> subprocess.Popen:
    """The chain in a process group of its own, its words in `<workdir>.log`."""
    command = [sys.executable, "-m", "snapgen_jax.cli", "chain", f"--config={config}", f"--workdir={workdir}"]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Waits for the end of a chain. Raises `RuntimeError` if it fails."""
    if code := process.wait():
        raise RuntimeError(f"the chain ended with {code}; see {workdir}.log")


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """`{file: its digest}` of what a chain leaves."""
    files = [path for pattern in COMPARED for path in sorted(workdir.glob(pattern))]
    return {str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Walks twice and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    parser.add_argument("--config", default="configs/full_path.py:runlocal")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default="")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    whole, killed = options.scratch / "whole", options.scratch / "killed"
    begin = time.monotonic()
    finish(start(options.config, whole), whole)
    seconds = time.monotonic() - begin
    moments, generator = [], random.Random(options.seed)
    for _ in range(options.kills):
        process = start(options.config, killed)
        moments.append(seconds * generator.uniform(0.05, 0.9 / options.kills))
        time.sleep(moments[-1])
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(start(options.config, killed), killed)
    expected, found = digests(whole), digests(killed)
    record = {
        "machine": machine(),
        "commit": commit(),
        "config": options.config,
        "minutes": round(seconds / 60, 2),
        "killed_after_seconds": [round(moment, 1) for moment in moments],
        "files": len(expected),
        "different": sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)),
    }
    print(json.dumps(record, indent=2))
    if options.save:
        (RESULTS / f"full_path-{options.save}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
