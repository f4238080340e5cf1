"""How many bytes weights of few levels take when they are packed, and how fast they are packed and unpacked.

    python -m benchmarks.packing                 # prints one JSON line a network
    python -m benchmarks.packing --save=cpu2     # and writes them to benchmarks/results/packing-cpu2.json
    python -m benchmarks.packing --networks=shapes

Integers are drawn evenly over the levels of each layer, which no entropy coder makes smaller than the levels are worth;
trained ones lie closer to 0. Every network is packed and unpacked in a process of its own, whose peak memory (the most
that it held, VmHWM) is its own: the packed file with all parameters, and of it the integers as int8, the size of what a
client writes when it starts for the first time. Layers of eight bits (the first and the last, and depthwise kernels)
and those that know the time are as in `recipes/quantised.py`: the second are a table of `--steps` rows.

`entropy` is what zlib makes of the integers as int8 at its best level, by a part of each layer: of integers that are
drawn evenly, and of normal ones that are rounded with the scale of least error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks.memory import memory
from snapgen_jax.export.digits import levels
from snapgen_jax.export.packing import Filling, Original, Sizes, sizes, write_packed
from snapgen_jax.training.exports import Stored

RESULTS = pathlib.Path(__file__).parent / "results"
SAMPLE = 1 << 16  # integers of a layer that are deflated
NORMAL = {1: 1.223, 2: 0.845, 3: 0.536, 4: 0.320}  # scales of least error for weights of N(0, 1)
STEPS = 50  # of the table in place of the layers of time

# What a client does when it starts for the first time: a process that has no JAX in it.
UNPACK = """
import json, sys, time
from benchmarks.memory import memory
from snapgen_jax.export.unpacking import PackedFile
begin, used = time.perf_counter(), time.process_time()
with PackedFile(sys.argv[1] + "/network.packed") as packed:
    packed.expand(sys.argv[1] + "/unpacked.int8")
spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - used}
print(json.dumps({**{name: round(x, 2) for name, x in spent.items()}, "peak_bytes": memory("VmHWM")}))
"""


def networks() -> dict[str, Callable[[], tuple[Any, dict[str, int]]]]:
    """`{name: make}`; `make()` returns the network's config and the bits of its layers."""
    from configs.bits import sd15, t2i
    from snapgen_jax.config import load_experiment
    from snapgen_jax.networks.quantise import bits_of, quantisable
    from snapgen_jax.networks.sd_unet import SDUNetConfig
    from snapgen_jax.networks.unet import UNetConfig

    def shapes() -> tuple[Any, dict[str, int]]:
        config = load_experiment("configs/shapes/quickstart.py", []).build("cpu").config.network
        return config, bits_of(quantisable(config), {}, 2)

    def of(config: Any, chosen: Mapping[str, int], default: int) -> tuple[Any, dict[str, int]]:
        return config, bits_of(quantisable(config), chosen, default)

    return {
        "shapes": shapes,
        "sd15": lambda: of(SDUNetConfig.preset("sd15"), sd15.published_bits(), 8),
        "t2i": lambda: of(UNetConfig.preset("t2i"), t2i.BITS, 2),
    }


def parameters(config: Any, bits: Mapping[str, int], steps: int = STEPS) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file stores: `{name: (shape, number of scales, bits)}` of weights of few levels, and `{path: shape}` of
    all else, a table of `steps` times in place of the layers that know the time alone."""
    from snapgen_jax.networks.module import build, flatten
    from snapgen_jax.networks.quantise import quantisable
    from snapgen_jax.networks.time_cache import TimeCachedConfig

    layers = quantisable(config)
    weights = {name: (layers[name].shape, layers[name].scales, b) for name, b in bits.items()}
    kept = flatten(build(TimeCachedConfig.of(config, steps))[1])
    packed = {f"{name}/kernel" for name in weights}
    others = {"/".join(path): tuple(leaf.shape) for path, leaf in kept.items() if "/".join(path) not in packed}
    return weights, others


def by_formula(config: Any, bits: Mapping[str, int]) -> Sizes:
    """The size of the packed file of a network, others and the table of times in float32."""
    weights, others = parameters(config, bits)
    return sizes(weights.values(), [(shape, 4) for shape in others.values()])


def float16_bytes(config: Any) -> int:
    """Of all parameters of a network in float16, the layers of the time among them."""
    from snapgen_jax.networks.counting import parameters as count

    return 2 * count(config)


def papers_count(config: Any, bits: Mapping[str, int], steps: int = STEPS) -> dict[str, float]:
    """The average bits and the bytes as BitsFusion counts them (Sui et al. 2024, section 4.3 and table 1).

    A weight counts log2 of its levels and a number of the table 16 bits; the average divides by all linear layers and
    convolutions, those of the time, which are not stored, among them. The file counts all other parameters, the scales
    and the table at 32 bits.
    """
    from snapgen_jax.networks.module import build, flatten
    from snapgen_jax.networks.time_cache import cached_values

    found, table = by_formula(config, bits), cached_values(config, steps)
    every = sum(math.prod(leaf.shape) for path, leaf in flatten(build(config)[1]).items() if path[-1] == "kernel")
    bytes_ = found.information + found.scales + found.others
    return {"average_bits": (8 * found.information + 16 * table) / every, "bytes": bytes_}


class Drawn(Mapping[str, Stored]):
    """Random weights of the levels and shapes of a network; each is drawn when it is asked for, and always the same."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Stored:
        shape, scales, bits = self._weights[name]
        rng, half = np.random.default_rng(zlib.crc32(name.encode())), levels(bits) // 2
        integers = rng.integers(-half, half + 1, shape, np.int8)
        scale = rng.random(scales, np.float32)
        return Stored(integers, scale.reshape(shape[0], 1, -1) if len(shape) == 3 else scale, bits)

    def __iter__(self):
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def deflated(weights: Mapping[str, Any], kind: str) -> float:
    """The bytes of all integers as int8 after zlib at its best, by the first `SAMPLE` of each layer: drawn evenly, or
    rounded from a normal distribution with the scale of least error."""
    total = 0.0
    for name, (shape, _, bits) in weights.items():
        rng, half, count = np.random.default_rng(zlib.crc32(name.encode())), levels(bits) // 2, math.prod(shape)
        few = min(SAMPLE, count)
        if kind == "even":
            integers = rng.integers(-half, half + 1, few)
        else:
            integers = np.clip(np.rint(rng.standard_normal(few) / NORMAL.get(bits, 4 / half)), -half, half)
        total += len(zlib.compress(integers.astype(np.int8).tobytes(), 9)) * count / few
    return total


def stage(name: str, which: str, folder: pathlib.Path) -> dict[str, Any]:
    """One stage, in this process."""
    config, bits = networks()[name]()
    weights, others = parameters(config, bits)
    drawn, path, plain = Drawn(weights), folder / "network.packed", folder / "network.int8"
    if which == "draw":
        fillings, place = [], 0
        with plain.open("wb") as file:
            for layer, stored in drawn.items():
                fillings.append((place, stored.integers.size, layer))
                place += file.write(stored.integers.tobytes())
        (folder / "fillings.json").write_text(json.dumps(fillings))
        return {}
    begin, used = time.perf_counter(), time.process_time()
    if which == "pack":
        holes = [
            Filling(at, size, "int8", layer) for at, size, layer in json.loads((folder / "fillings.json").read_text())
        ]
        rest = {path: np.random.default_rng(1).random(shape, np.float32) for path, shape in others.items()}
        write_packed(path, drawn, rest, Original(plain, holes, {}))
    else:
        return {kind: round(deflated(weights, kind)) for kind in ("even", "normal")}
    return {
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
        "peak_bytes": memory("VmHWM"),
    }


def measure(name: str, machine: str) -> dict[str, Any]:
    """Everything about a network."""
    config, bits = networks()[name]()
    found, (weights, _) = by_formula(config, bits), parameters(config, bits)
    share: dict[str, int] = {}
    for shape, _, b in weights.values():
        share[str(b)] = share.get(str(b), 0) + math.prod(shape)
    result: dict[str, Any] = {
        "machine": machine,
        "network": name,
        "layers": len(weights),
        "weights": found.count,
        "weights_by_bits": dict(sorted(share.items())),
        "formula": {
            "bytes": found.total,
            "weights": found.weights,
            "scales": found.scales,
            "others": found.others,
            "bits_a_weight": round(found.bits, 4),
        },
        "paper": papers_count(config, bits),
        "float16_bytes": float16_bytes(config),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for which in ("draw", "pack", "unpack", "entropy"):
            command = ["-m", "benchmarks.packing", f"--networks={name}", f"--stage={which}", f"--folder={folder}"]
            command = ["-c", UNPACK, str(folder)] if which == "unpack" else command
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, check=False, cwd=RESULTS.parents[1]
            )
            if done.returncode:
                raise RuntimeError(f"{name}, {which}: {done.stderr[-2000:]}")
            result[which] = json.loads(done.stdout.splitlines()[-1])
            if which == "pack":
                size = (folder / "network.packed").stat().st_size
                ratio = round(result["float16_bytes"] / size, 3)
                result["file"] = {
                    "bytes": size,
                    "over_formula": round(size / found.total - 1, 5),
                    "float16_ratio": ratio,
                }
        same = _digest(folder / "network.int8") == _digest(folder / "unpacked.int8")
        if not same:
            raise RuntimeError(f"{name}: what was unpacked is not what was packed")
    del result["draw"]
    return result


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> None:
    """Measures, and prints or stores what was measured."""
    parser = argparse.ArgumentParser(description="How small weights of few levels become, and how fast.")
    parser.add_argument("--networks", default="shapes,t2i,sd15", help="with commas (default: all)")
    parser.add_argument("--save", default="", help="name of the machine, for the file of results")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = options.networks.split(",")
    if options.stage:
        print(json.dumps(stage(names[0], options.stage, pathlib.Path(options.folder))))
        return
    from benchmarks.measuring import commit, machine

    results = []
    for name in names:
        results.append({**measure(name, machine()), "commit": commit()})
        print(json.dumps(results[-1]), flush=True)
    if options.save:
        (RESULTS / f"packing-{options.save}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
