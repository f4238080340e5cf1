"""What benchmarks have in common: the name of the machine, taking turns, and numbers in place of weights."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
CPUINFO = pathlib.Path("/proc/cpuinfo")


def machine() -> str:
    """Where a number was measured: processor, cores, accelerators, JAX."""
    named = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text() if CPUINFO.exists() else "", flags=re.MULTILINE)
    processor = named.group(1).strip() if named else platform.machine()
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{processor}, {os.cpu_count()} CPU cores, {devices}, jax {jax.__version__}"


def commit() -> str:
    """Of the code that measured, "-dirty" where files differ from it; "" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def append(result: Mapping[str, Any], name: str, save: str) -> None:
    """Prints a result as a line of JSON, and adds it to `results/NAME-SAVE.jsonl` where there is a `save`."""
    line = json.dumps(result)
    print(line, flush=True)
    if save:
        with (pathlib.Path(__file__).parent / "results" / f"{name}-{save}.jsonl").open("a") as file:
            file.write(line + "\n")


def by_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round, in each of which all take turns; after one that compiles, which is not
    counted. They do so in another order every round: a call is faster behind some calls than behind others."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    generator, names = np.random.default_rng(0), list(calls)
    for _ in range(rounds + 1):
        for i in generator.permutation(len(names)):
            begin = time.perf_counter()
            jax.block_until_ready(calls[names[i]]())
            times[names[i]].append(time.perf_counter() - begin)
    return {name: measured[1:] for name, measured in times.items()}


def fastest(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call: the fewest of some rounds, see `by_turns`; other work on the machine only adds to them."""
    return {name: min(times) for name, times in by_turns(calls, rounds).items()}


def random_like(spec: Tree, dtype: Any = None) -> Tree:
    """Arrays of a tree of shapes, drawn where they will lie: small numbers, of `dtype` where that is given, and ones
    where integers are asked for."""

    def one(s: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(s.dtype, jnp.floating):
            return jnp.ones(s.shape, s.dtype)
        return _draw(jax.random.key(s.size % 1009), s.shape, dtype or s.dtype)

    return jax.tree.map(one, spec)


@jax.jit(static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)
