"""The full-size units of a bundle, with random weights: conversion, the operator gate, and a step on LiteRT.

    python -m benchmarks.export_full                       # prints one JSON line a unit
    python -m benchmarks.export_full --save=cpu2           # and adds it to benchmarks/results/export_full-cpu2.jsonl
    python -m benchmarks.export_full --units=decoder_1024,clip_l

Every stage of every unit is a process of its own, whose peak memory (the most that it held, VmHWM) is its own: the
conversion to float32, the cast to float16, the rounding to eight bits, the reference in JAX, and LiteRT on each file.
`ms` is the median of `--runs` calls after the first, on `--threads` threads, and `cpu_ms` the processor time of one,
which other work on the machine hardly changes; so are `seconds` and `cpu_seconds` of a conversion. A UNet takes 14 GB
to convert.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
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

VARIANTS = ("f16", "int8")
STAGES = ("f32", *VARIANTS, "reference", "run_f32", *(f"run_{name}" for name in VARIANTS))
CONTEXT_TOKENS = 205  # 77 of the CLIPs and 128 of Gemma
MOST = 15.0  # GB that a conversion may take


def units() -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """`{name: make}`; `make()` returns the unit, and the shapes of its roles' parameters."""
    import jax
    import jax.numpy as jnp

    from snapgen_jax.inputs._export import decoder_unit
    from snapgen_jax.inputs._published_export import UNIT_PARAMETERS, layer_ranges, text_units
    from snapgen_jax.networks.autoencoder import AutoencoderConfig
    from snapgen_jax.networks.clip import ClipTextConfig
    from snapgen_jax.networks.codec import CodecConfig
    from snapgen_jax.networks.module import build
    from snapgen_jax.networks.text import TextContext
    from snapgen_jax.networks.tiny_decoder import TinyDecoderConfig
    from snapgen_jax.networks.unet import UNetConfig
    from snapgen_jax.recipes._flow_export import denoiser_unit

    def unet(side: int, tokens: int) -> tuple[Any, dict[str, Any]]:
        config, width = UNetConfig.preset("t2i"), 2048
        shapes: Any = [jax.ShapeDtypeStruct((1, *s), jnp.float32) for s in ((tokens, width), (tokens,), (width,))]
        return denoiser_unit("unet", config, (side, side, 16), TextContext(*shapes)), {"unet": build(config)[1]}

    def text(name: str, part: int) -> tuple[Any, dict[str, Any]]:
        config = ClipTextConfig.preset(name)
        return text_units(name, config, config.max_tokens)[part], {name: build(config)[1]}

    def decoder(side: int) -> tuple[Any, dict[str, Any]]:
        codec = CodecConfig(
            kind="autoencoder",
            autoencoder=AutoencoderConfig.preset("sd3"),
            decoder="tiny",
            tiny_decoder=TinyDecoderConfig.preset("sd3"),
        )
        return decoder_unit(codec, (side, side, 16)), {"codec/decoder": build(codec.tiny_decoder)[1]}

    found: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
        "decoder_256": lambda: decoder(32),
        "decoder_1024": lambda: decoder(128),
        "clip_l": lambda: text("clip_l", 0),
    }
    for i in range(len(layer_ranges(ClipTextConfig.preset("clip_g"), UNIT_PARAMETERS))):
        found[f"clip_g_{i + 1}"] = lambda i=i: text("clip_g", i)
    found["unet_256"] = lambda: unet(32, 77)
    found["unet_1024"] = lambda: unet(128, CONTEXT_TOKENS)
    return found


def weights(unit: Any, spec: Mapping[str, Any]) -> Any:
    """What the unit reads of parameters that are the same in every process; gains are about one, and no two equal."""
    import jax

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        seed = zlib.crc32(str(path).encode())  # two that are equal would be stored once
        x = np.random.default_rng(seed).standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            return (1.0 if "scale" in str(path[-1]) else 0.0) + np.float32(0.02) * x
        return x * np.float32(0.7 / np.sqrt(np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(draw, unit.select(spec))


def inputs(unit: Any) -> dict[str, np.ndarray]:
    """One call's."""
    random = np.random.default_rng(0)
    made = {}
    for name, spec in unit.inputs.items():
        if np.issubdtype(spec.dtype, np.integer):
            made[name] = random.integers(0, 40_000, spec.shape).astype(np.int32)
        else:
            made[name] = (
                np.ones(spec.shape, np.float32) if name.endswith("mask") else random.standard_normal(spec.shape)
            )
    return {name: np.asarray(x, np.int32 if x.dtype == np.int32 else np.float32) for name, x in made.items()}


def stage(name: str, which: Any, folder: pathlib.Path, backend: Any, runs: int, threads: int) -> dict[str, Any]:
    """One stage of a unit, in this process."""
    f32, file = folder / "f32.tflite", folder / f"{which.removeprefix('run_')}.tflite"
    start = time.perf_counter()
    if which.startswith("run"):
        return {**_run(file, folder, runs, threads), "peak_gb": memory("VmHWM") / 1e9}
    if which in VARIANTS:
        from snapgen_jax.export.precision import write_variant

        write_variant(which, f32, file)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time(),
            "bytes": file.stat().st_size,
            "peak_gb": memory("VmHWM") / 1e9,
        }
    unit, spec = units()[name]()
    if which == "f32":
        return {**_convert(unit, weights(unit, spec), f32, backend), "peak_gb": memory("VmHWM") / 1e9}
    import jax

    given: Any = inputs(unit)
    np.savez(folder / "inputs.npz", **given)
    expected: Any = jax.device_get(jax.jit(unit.function)(weights(unit, spec), **given))
    np.savez(folder / "expected.npz", **expected)
    return {"peak_gb": memory("VmHWM") / 1e9}


def _convert(unit: Any, params: Any, path: pathlib.Path, backend: Any) -> dict[str, Any]:
    import jax

    from snapgen_jax.export.compat import Requirements, check
    from snapgen_jax.export.convert import to_tflite

    start, used = time.perf_counter(), time.process_time()
    to_tflite(unit.function, params, unit.inputs, unit.name, path, backend)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - used
    ids = any(np.issubdtype(spec.dtype, np.integer) for spec in unit.inputs.values())
    description = check(path, Requirements(gpu=not ids))  # raises where a phone would not run it
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "bytes": path.stat().st_size,
        "gate": "CPU" if ids else "GPU",
        "operators": sum(description.histogram.values()),
        "max_rank": description.max_rank,
    }


def _run(path: pathlib.Path, folder: pathlib.Path, runs: int, threads: int) -> dict[str, Any]:
    from ai_edge_litert.interpreter import Interpreter

    given, expected = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "expected"))
    start = time.perf_counter()
    interpreter = Interpreter(model_path=str(path), num_threads=threads)
    (signature,) = interpreter.get_signature_list()
    run = interpreter.get_signature_runner(signature)
    out = run(**given)
    first = time.perf_counter() - start
    times, busy = [], []
    for _ in range(runs):
        start, used = time.perf_counter(), time.process_time()
        run(**given)
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    errors = [np.linalg.norm(out[n] - x) / np.linalg.norm(x) for n, x in expected.items()]
    ms, cpu_ms = (1e3 * float(np.median(x)) for x in (times, busy))
    return {"first_call_s": first, "ms": ms, "cpu_ms": cpu_ms, "rel_l2": float(max(errors))}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All stages of a unit, each in a process of its own; "error" in place of a stage that failed ends it."""
    found: dict[str, Any] = {"unit": name, "backend": options.backend, "threads": options.threads}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for which in STAGES:
            command = [sys.executable, "-m", "benchmarks.export_full", f"--stage={which}", f"--units={name}"]
            command += [f"--folder={folder}", f"--backend={options.backend}"]
            command += [f"--runs={options.runs}", f"--threads={options.threads}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1][:500]
                return {**found, "error": f"{which} ended with code {done.returncode}: {last}"}
            result = json.loads(done.stdout.strip().splitlines()[-1])
            found[which] = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
            print(f"{name} {which}: {found[which]}", file=sys.stderr, flush=True)
    found["within_limit"] = max(found[which]["peak_gb"] for which in ("f32", *VARIANTS)) <= MOST
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", help="names, separated by commas (default: all)")
    parser.add_argument("--backend", choices=("litert", "jax2tf"), default="litert")
    parser.add_argument("--threads", type=int, default=1, help="of LiteRT (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="calls that are timed (default: %(default)s)")
    parser.add_argument("--scratch", help="folder for 4 GB of files (default: that of the system)")
    parser.add_argument("--save", default="", help="name of the machine, for benchmarks/results/")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        folder = pathlib.Path(options.folder)
        print(json.dumps(stage(options.units, options.stage, folder, options.backend, options.runs, options.threads)))
        return
    from benchmarks.measuring import append, commit, machine

    place = {"machine": machine(), "commit": commit(), "python": platform.python_version()}
    for name in options.units.split(",") if options.units else units():
        append({**measure(name, options), **place}, "export_full", options.save)


if __name__ == "__main__":
    main()
