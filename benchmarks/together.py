"""Milliseconds of an update of several runs in one program, beside those of one run.

    python -m benchmarks.together                                     # the student of the shapes world, 1 and 4 runs
    python -m benchmarks.together --config=student_few_step --runs 6  # any of its stages
    python -m benchmarks.together --depthwise=shifted --dtype=bfloat16 --save=NAME

Prints one JSON line a measurement, and with --save adds them to `benchmarks/results/together-NAME.jsonl`. Frozen
networks and batches are random, since the time does not depend on them. Processes that are started together compile at
the same time and take turns to measure.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, get_args

import jax

from benchmarks.claims.runs import fix_platform
from benchmarks.measuring import append, machine, random_like
from snapgen_jax.config import load_config, resolve
from snapgen_jax.networks.depthwise import Form
from snapgen_jax.process import prepare
from snapgen_jax.training.keys import key
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from snapgen_jax.training.together import Together


def recipe_of(name: str, depthwise: str, dtype: str) -> Recipe:
    """That of a stage on patches of pixels."""
    config = load_config(f"configs/shapes/{name}.py:quick")
    fix_platform(config, dtype=dtype, depthwise=depthwise)
    return resolve(config).build(jax.default_backend())


def measure(recipe: Recipe, runs: int, updates: int) -> dict[str, float]:
    """Of so many runs of a recipe in one program."""
    several = recipe if runs == 1 else Together([recipe] * runs, range(runs))
    state = jax.jit(several.init)(key(0, 0, "init"))
    frozen, batch = random_like(several.frozen_spec()), random_like(next(iter(several.batch_specs().values())))
    begin = time.perf_counter()
    step: Callable[..., Any] = jax.jit(make_step(several, 0), donate_argnums=0).lower(state, frozen, batch).compile()
    compiled = time.perf_counter() - begin
    with (pathlib.Path(tempfile.gettempdir()) / "snapgen-measures").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for _ in range(5):
            state, _ = step(state, frozen, batch)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for _ in range(updates):
            state, _ = step(state, frozen, batch)
        dispatched = time.perf_counter() - begin
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
    return {
        "milliseconds": 1e3 * seconds / updates,
        "milliseconds_to_dispatch": 1e3 * dispatched / updates,
        "updates_of_a_run_per_second": runs * updates / seconds,
        "compile_seconds": compiled,
    }


def main() -> None:
    """Measures, prints and keeps."""
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="student", help="a stage under configs/shapes that draws pictures")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--depthwise", choices=get_args(Form), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--save", default="", help="name of the machine, for benchmarks/results/")
    options = parser.parse_args()
    recipe = recipe_of(options.config, options.depthwise, options.dtype)
    for runs in options.runs:
        asked = {name: getattr(options, name) for name in ("config", "depthwise", "dtype")}
        found = measure(recipe, runs, options.updates)
        row = {**asked, "runs": runs, **found, "machine": machine(), "load": os.getloadavg()[0]}
        append(row, "together", options.save)


if __name__ == "__main__":
    main()
