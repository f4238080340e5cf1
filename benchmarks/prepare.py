"""Images a second and memory of `snapgen prepare collect`, in process, on photographs and rendered scenes.

python -m benchmarks.prepare                  # prints one JSON line; about a minute
python -m benchmarks.prepare --save=NAME      # and writes it to benchmarks/results/prepare-NAME.jsonl
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import append, commit, machine
from snapgen_jax.data.shapes import render
from snapgen_jax.data.shapes_grammar import sample_scene

# A process of its own, whose greatest memory is that of the collection alone.
_COLLECT = """
import json, sys, time
from benchmarks.memory import memory
from snapgen_jax.cli import main
begin, cpu = time.perf_counter(), time.process_time()
code = main(["prepare", "collect", "--source=tar", *sys.argv[1:]])
print(json.dumps({"code": code, "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu,
    "peak_mb": memory("VmHWM") / 1e6}))
"""


def write_tars(folder: pathlib.Path, count: int, size: int) -> int:
    """Writes rendered scenes as JPEG with captions, 500 a tar; returns the bytes."""
    rng = np.random.default_rng(0)
    for start in range(0, count, 500):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
            for number in range(start, min(start + 500, count)):
                buffer = io.BytesIO()
                noise = rng.integers(0, 24, (size, size, 3), np.uint8)  # so that no two files are equal
                Image.fromarray(np.minimum(render(sample_scene(rng), size), 231) + noise).save(buffer, "JPEG")
                for extension, data in (("jpg", buffer.getvalue()), ("txt", f"scene {number}".encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(count: int, size: int, options: list[str]) -> dict[str, Any]:
    """One collection of rendered scenes."""
    with tempfile.TemporaryDirectory() as temporary:
        source, out = pathlib.Path(temporary) / "tars", pathlib.Path(temporary) / "out"
        source.mkdir()
        size_of_source = write_tars(source, count, size)
        begin = time.perf_counter()
        command = [sys.executable, "-c", _COLLECT, f"--path={source}", f"--out={out}", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if found["code"] != 0:
            raise RuntimeError(done.stderr)
        kept = json.loads((out / "manifest.json").read_text())["facts"]["kept"]
    return {
        "benchmark": "prepare.collect",
        "images": count,
        "kept": kept,
        "side": size,
        "source_mb": round(size_of_source / 1e6, 1),
        "options": options,
        "images_per_second": round(count / found["seconds"], 1),
        "cpu_ms_per_image": round(found["cpu_seconds"] / count * 1e3, 2),
        "seconds": round(found["seconds"], 2),
        "with_start_of_process_s": round(time.perf_counter() - begin, 2),
        "peak_mb": round(found["peak_mb"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="how many (default: %(default)s)")
    parser.add_argument("--side", type=int, default=256, help="of an image, in pixels (default: %(default)s)")
    parser.add_argument("--save", default="", help="name of the machine, for benchmarks/results/")
    options, others = parser.parse_known_args()  # what else is given goes to `snapgen prepare collect`
    result = {**measure(options.images, options.side, others), "machine": machine(), "load": os.getloadavg()[0]}
    append({**result, "commit": commit()}, "prepare", options.save)


if __name__ == "__main__":
    main()
