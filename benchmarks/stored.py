"""Examples a second from stored shards, and what a mixture of many of them costs.

python -m benchmarks.stored                  # prints one JSON line a measurement; about a minute
python -m benchmarks.stored --save=NAME      # and writes them to benchmarks/results/stored-NAME.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import threading
import time
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.measuring import machine
from benchmarks.memory import memory
from snapgen_jax.data import shards
from snapgen_jax.data.config import DataConfig, DomainConfig
from snapgen_jax.data.pipeline import Pipeline

BATCH, EXAMPLES, DOMAINS = 32, 256, 35
TOKENS = {"clip_l": (77,), "clip_g": (77,), "language": (128,)}
STATES = {
    "clip_l_states": (77, 768),
    "clip_l_pooled": (768,),
    "clip_g_states": (77, 1280),
    "clip_g_pooled": (1280,),
    "language_states": (128, 2304),
}


def arrays(form: str, size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{array: shape and dtype} of an example at full size."""
    text = {name: (shape, np.dtype(np.int32)) for name, shape in TOKENS.items()}
    if form == "states":
        text = {name: (shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in STATES.items()}
    return {
        "latent": ((size // 8, size // 8, 16), np.dtype(ml_dtypes.bfloat16)),
        "language_mask": ((128,), np.dtype(np.float32)),
        **text,
    }


def write(folder: pathlib.Path, form: str, size: int, count: int) -> pathlib.Path:
    """Shards of noise, which no compression makes smaller."""
    wanted, rng = arrays(form, size), np.random.default_rng(0)

    def example() -> dict[str, Any]:
        made: dict[str, Any] = {"captions": ["a caption"], "id": "an id"}
        for name, (shape, dtype) in wanted.items():
            whole = shape if name == "latent" else (1, *shape)
            made[name] = (100 * rng.standard_normal(whole, np.float32)).astype(dtype)
        return made

    bucket = f"{size}x{size}"
    shard = shards.write_shard(folder, shards.shard_name(bucket, 0, 1), (example() for _ in range(count)), bucket)
    entries = {n: shards.StoredArray(d.name, s, captions=n != "latent") for n, (s, d) in wanted.items()}
    shards.Manifest("encoded", entries, (shard,), {"sizes": {bucket: [size, size]}}).write(folder)
    return folder


def read(config: DataConfig, form: str, size: int, seconds: float) -> dict[str, Any]:
    """Examples a second once the pipeline runs, with the threads of the process and the memory it has gained."""
    specs = {n: SimpleNamespace(shape=(BATCH, *s), dtype=d) for n, (s, d) in arrays(form, size).items()}
    before = memory("VmRSS")
    batches = Pipeline(config, {f"{size}x{size}": specs}).batches()
    next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    found = {
        "examples_per_second": round(count * BATCH / elapsed),
        "megabytes_per_second": round(count * BATCH * example_bytes(form, size) / elapsed / 1e6),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
        "megabytes_gained": round((memory("VmRSS") - before) / 1e6),
    }
    batches.close()
    return found


def example_bytes(form: str, size: int) -> int:
    """Of the arrays of one example with one caption."""
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays(form, size).values())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    rows = []

    def say(**row: Any) -> None:
        rows.append({"machine": machine(), **row})
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        for form, size in (("states", 256), ("tokens", 256), ("tokens", 512), ("tokens", 1024)):
            folder = write(root / f"{form}_{size}", form, size, EXAMPLES)
            for threads in (1, 4):
                config = DataConfig(source="stored", path=str(folder), validation_share=0.0, threads=threads)
                found = read(config, form, size, options.seconds)
                say(benchmark="stored.read", form=form, size=size, threads_asked=threads, **found)
        for count in (1, DOMAINS):
            folders = [write(root / f"domain_{count}_{n}", "tokens", 256, 64) for n in range(count)]
            mixture = tuple(DomainConfig(source="stored", path=str(p), validation_share=0.0) for p in folders)
            found = read(DataConfig(mixture=mixture), "tokens", 256, options.seconds)
            say(benchmark="stored.mixture", domains=count, **found)
    if options.save:
        path = pathlib.Path(__file__).parent / "results" / f"stored-{options.save}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
