"""Images a second of the input pipeline alone, on the shapes world, and what an example costs.

python -m benchmarks.data                  # prints one JSON line a measurement; about a minute
python -m benchmarks.data --save=NAME      # and writes them to benchmarks/results/data-NAME.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.measuring import machine
from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.pipeline import Pipeline
from snapgen_jax.data.shapes import render
from snapgen_jax.data.shapes_grammar import ShapesConfig, sample_scene
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tokenizer import Tokenizer, train_tokenizer

BATCH, LENGTH = 32, 16


def cpu_microseconds(function: Callable[[int], object], count: int = 2000) -> float:
    """Processor time of one call, which other jobs on the machine do not lengthen much."""
    start = time.process_time()
    for i in range(count):
        function(i)
    return (time.process_time() - start) / count * 1e6


def example_cost(size: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Microseconds of processor time that each part of an example takes."""
    source = build_source(DataConfig(shapes=ShapesConfig(size=size)))
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(2000)]
    captions = [source.example(i, rng, ("caption",))["caption"] for i in range(2000)]
    parts = {
        "generator_us": cpu_microseconds(lambda i: np.random.default_rng((0, 0, i))),
        "scene_us": cpu_microseconds(lambda i: sample_scene(rng)),
        "render_us": cpu_microseconds(lambda i: render(scenes[i], size)),
        "tokenize_us": cpu_microseconds(lambda i: tokenizer.encode([captions[i]], LENGTH)),
    }
    return {"benchmark": "data.example", "size": size, **{name: round(value, 1) for name, value in parts.items()}}


def throughput(size: int, workers: int, tokenizer: Tokenizer, seconds: float) -> dict[str, Any]:
    """Images a second once the pipeline runs, and the seconds until its first batch."""
    config = dataclasses.replace(DataConfig(), shapes=ShapesConfig(size=size), workers=workers)
    specs = {
        "image": SimpleNamespace(shape=(BATCH, size, size, 3), dtype=np.uint8),
        "tokens": SimpleNamespace(shape=(BATCH, LENGTH), dtype=np.int32),
        "mask": SimpleNamespace(shape=(BATCH, LENGTH), dtype=np.float32),
    }
    batches = Pipeline(config, {"bucket": specs}, tokenizer).batches()
    start = time.perf_counter()
    next(batches)
    first, cpu = time.perf_counter(), time.process_time()
    count, elapsed = 0, 0.0
    while elapsed < seconds:
        next(batches)
        count, elapsed = count + 1, time.perf_counter() - first
    used = time.process_time() - cpu
    batches.close()
    return {
        "benchmark": "data.pipeline",
        "size": size,
        "workers": workers,
        "images_per_second": round(count * BATCH / elapsed),
        "first_batch_s": round(first - start, 2),
        "main_process_cpu_us_per_image": round(used / (count * BATCH) * 1e6, 1),
    }


def measure(seconds: float) -> Iterator[dict[str, Any]]:
    """All measurements, one after another."""
    config = DataConfig()
    start = time.process_time()
    tokenizer = train_tokenizer(build_source(config), config)
    yield {"benchmark": "data.tokenizer", "captions": 20_000, "cpu_s": round(time.process_time() - start, 2)}
    for size in (32, 64):
        yield example_cost(size, tokenizer)
    for size, workers in itertools.product((32, 64), (0, 1, 2)):
        yield throughput(size, workers, tokenizer, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--save", default="", help="name of the machine, for benchmarks/results/")
    options = parser.parse_args()
    lines = []
    for result in measure(options.seconds):
        lines.append(json.dumps({**result, "machine": machine(), "load": os.getloadavg()[0]}))
        print(lines[-1], flush=True)
    if options.save:
        path = pathlib.Path(__file__).parent / "results" / f"data-{options.save}.jsonl"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
