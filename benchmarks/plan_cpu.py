"""The plan's arithmetic held against a step that runs: the roofline of this CPU, from its own measured peaks.

    python -m benchmarks.plan_cpu

Prints and stores (`results/plan_cpu.json`) the ratio of the measured time of a training step to the roofline's.
"""

from __future__ import annotations

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import fastest, machine
from snapgen_jax.config import load_experiment
from snapgen_jax.parallel.chips import Chip, Roofline
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from snapgen_jax.training.keys import key
from snapgen_jax.training.step import lower_abstract_step

RESULT = pathlib.Path(__file__).parent / "results" / "plan_cpu.json"
CONFIG = "configs/shapes/quickstart.py"


def measured_peaks() -> Chip:
    """This machine as a chip: a large matrix product, and a sum of two arrays that no cache holds."""
    size = 2048
    a = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    x = jnp.ones(64 * 2**20)
    added = jax.jit(lambda x: x + 1.0)
    times = fastest({"product": lambda: product(a), "sum": lambda: added(x)}, rounds=10)
    flops, bandwidth = 2 * size**3 / times["product"], 2 * x.nbytes / times["sum"]
    return Chip("cpu", flops, 0, bandwidth, 1.0, 1, ("cpu",), "measured here")


def main() -> None:
    """Measures and stores."""
    recipe = load_experiment(CONFIG).build("cpu")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    (bucket, spec), *_ = recipe.batch_specs().items()
    lowered, _ = lower_abstract_step(recipe, 0, mesh, bucket)
    compiled, chip = lowered.compile(), measured_peaks()
    cost = compiled.cost_analysis() or {}
    roofline = Roofline(chip, cost["flops"], cost["bytes accessed"])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.jit(recipe.init, out_shardings=replicated)(key(0, 0, "init"))
    batch = put_batch({name: np.ones(s.shape, s.dtype) for name, s in spec.items()}, mesh)
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        state, _ = compiled(state, {}, batch)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - begin)
    step = float(np.median(times[5:]))
    record = {
        "config": CONFIG,
        "machine": machine(),
        "peak_gflops": chip.flops / 1e9,
        "peak_gigabytes_per_second": chip.hbm_bandwidth / 1e9,
        "step_gflop": roofline.flops / 1e9,
        "step_gigabytes": roofline.bytes_accessed / 1e9,
        "roofline_seconds": roofline.seconds,
        "bound": roofline.bound,
        "measured_seconds": step,
        "measured_over_roofline": step / roofline.seconds,
        "arithmetic_share": roofline.times["compute"] / step,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
