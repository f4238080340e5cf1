"""What huge pages for XLA's temporaries are worth on CPU: the quickstart's update with and without them, in turns.

    python -m benchmarks.huge_pages          # writes results/huge_pages.json

Linux with glibc 2.35 or later, where `/sys/kernel/mm/transparent_hugepage/enabled` says `madvise`; elsewhere the two
are the same.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.measuring import machine
from snapgen_jax.process import HUGE_PAGES_TUNABLE

RESULT = pathlib.Path(__file__).parent / "results" / "huge_pages.json"
CONFIG = "configs/shapes/quickstart.py"
TUNABLES = {"small_pages": "", "huge_pages": HUGE_PAGES_TUNABLE}
ROUNDS, UPDATES = 3, 30


def child() -> None:
    """Prints the milliseconds of one update, and the machine's name."""
    import jax

    from snapgen_jax.config import load_experiment
    from snapgen_jax.experiment import Experiment
    from snapgen_jax.training.keys import key
    from snapgen_jax.training.step import make_step

    with tempfile.TemporaryDirectory() as workdir:
        experiment = Experiment(load_experiment(CONFIG), workdir)
        state: Any = jax.jit(experiment.recipe.init)(key(0, 0, "init"))
        batch = jax.device_put(next(experiment.data.batches(0)).arrays)
    step = jax.jit(make_step(experiment.recipe, 0), donate_argnums=0)
    times = []
    for _ in range(UPDATES):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, {}, batch))
        times.append(time.perf_counter() - begin)
    milliseconds = 1e3 * statistics.median(times[UPDATES // 3 :])
    print(json.dumps({"milliseconds": milliseconds, "machine": machine()}))


def main() -> None:
    """Runs both in turns and keeps the medians."""
    found: dict[str, list[float]] = {name: [] for name in TUNABLES}
    said: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for name, tunables in TUNABLES.items():
            environment = {**os.environ, "GLIBC_TUNABLES": tunables, "JAX_PLATFORMS": "cpu"}
            environment["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(tempfile.gettempdir()) / "huge_pages_xla")
            command = [sys.executable, "-m", "benchmarks.huge_pages", "--child"]
            out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            said = json.loads(out.splitlines()[-1])
            found[name].append(said["milliseconds"])
    medians = {f"{name}_ms": statistics.median(times) for name, times in found.items()}
    record = {
        **medians,
        "ratio": medians["small_pages_ms"] / medians["huge_pages_ms"],
        "machine": f"{said['machine']}, Linux {platform.release()}",
        "python": platform.python_version(),
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
