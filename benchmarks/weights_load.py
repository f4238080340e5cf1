"""Host memory and speed of loading a checkpoint onto 8 devices.

    python -m benchmarks.weights_load --megabytes=1000     # writes the files, loads them, prints one JSON line
    python -m benchmarks.weights_load --save=NAME          # and adds it to benchmarks/results/weights_load-NAME.jsonl

The files are those of a T5 encoder, as deep as the size asks for, in bfloat16. `overhead_mb` is the growth of the
process's peak memory (Linux: VmHWM) beyond the loaded arrays themselves, which on a CPU lie in the same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.measuring import append, machine
from benchmarks.memory import memory
from snapgen_jax.networks import t5
from snapgen_jax.networks.module import build, count_parameters
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps.t5 import weight_map

MB = 1e6


def config_of(megabytes: float) -> t5.T5Config:
    """A T5 encoder whose bfloat16 checkpoint has about this size."""
    config = t5.T5Config(width=1024, heads=16, ffn_width=2560, vocab_size=8192, layers=1)
    layer = 2 * (4 * config.width**2 + 3 * config.width * config.ffn_width)
    return t5.T5Config(**{**vars(config), "layers": max(1, round((megabytes * MB - 2 * 8192 * 1024) / layer))})


def write(folder: pathlib.Path, config: t5.T5Config, files: int) -> None:
    """Writes a checkpoint of that config, one file at a time."""
    shapes = list(reference_shapes(weight_map(config), build(config)[1]).items())
    rows = np.arange(64, dtype=np.float32)
    listed = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = shapes[number::files]
        save_file({n: np.resize(rows, s).astype(ml_dtypes.bfloat16) for n, s in part}, folder / file)
        listed.update(dict.fromkeys((name for name, _ in part), file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def measure(folder: pathlib.Path, config: t5.T5Config) -> dict[str, float | int | str]:
    """Loads the folder fully sharded over all devices."""
    _, spec = build(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    shardings = tree_shardings(spec, config.rules(), mesh)
    jax.block_until_ready(jax.device_put(jnp.zeros(8), jax.devices()[-1]))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = memory("VmRSS") / MB, time.perf_counter()
    params = load(folder, weight_map(config), spec, shardings)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") / MB
    leaves = jax.tree.leaves(params)
    arrays = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards) / MB
    largest = max(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards) / MB
    return {
        "machine": machine(),
        "parameters": count_parameters(spec),
        "devices": mesh.size,
        "arrays_mb": round(arrays, 1),
        "largest_shard_mb": round(largest, 1),
        "overhead_mb": round(peak - before - arrays, 1),
        "seconds": round(seconds, 2),
        "mb_per_second": round(arrays / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--save", default="", help="name of the machine, for benchmarks/results/")
    arguments = parser.parse_args()
    config = config_of(arguments.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), config, arguments.files)
        append(measure(pathlib.Path(folder), config), "weights_load", arguments.save)


if __name__ == "__main__":
    main()
