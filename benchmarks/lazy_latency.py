"""What skipped modules save: TFLite and JAX on a CPU, one thread, against how many modules a step skips.

    python -m benchmarks.lazy_latency                 # prints a line of JSON for each network
    python -m benchmarks.lazy_latency --save=cpu2     # and adds it to benchmarks/results/lazy_latency-cpu2.jsonl

For each network, with random weights, in one run in which all take turns:

- `static`: the graphs of one `.tflite` file of `recipes/_lazy_export.py` that skip 0, 1, 2 ... of the modules, in the
  order in which they run, and "dense", the network without caches. `*_fit` is the least-squares line through medians of
  the time of a call (`wall`) and of its processor time (`cpu`), which other work on the machine hardly changes;
  `*_half_of_dense` is the graph that skips half of the modules against the plain network; `*_schedule_half_of_dense` is
  a step that runs whole and one that skips all, which is half of all module calls.
- `adaptive`: the same in one graph with an IF for each module.
- `jax`: at batch 1 under a schedule that skips a share of all module calls, as gates do that may skip at every other
  step: executed module calls, FLOPs that XLA counts in the compiled steps, and seconds of a sample.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.export_full import inputs, weights
from benchmarks.measuring import append, commit, machine
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.runtime import litert_unit
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.module import build
from snapgen_jax.networks.text import TextContext
from snapgen_jax.recipes._flow_export import denoiser_unit
from snapgen_jax.recipes._gates import gated_modules
from snapgen_jax.recipes._lazy_export import adaptive_plan, scheduled_plan
from snapgen_jax.training.exports import ExportPlan

# {network: (config, side of the latent)}
NETWORKS = {
    "shapes": (DiTConfig.preset("shapes"), 8),
    "wide": (
        DiTConfig(latent_channels=16, patch=1, depth=4, heads=8, head_dim=64, sigma="none"),
        16,
    ),
}
STEPS = 20
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
Times = dict[str, list[float]]


class Lazy:
    """A denoiser whose modules can be skipped.

    Attributes:
        dense: the unit without skipping.
        modules: in the order in which they run.
        spec: shapes of its parameters.
    """

    def __init__(self, config: DiTConfig, side: int) -> None:
        shapes: Any = [jax.ShapeDtypeStruct((1, *s), jnp.float32) for s in ((0, config.width), (0,), (config.width,))]
        self.dense = denoiser_unit("dit", config, (side, side, config.latent_channels), TextContext(*shapes))
        network, spec = build(config)
        self.modules, self.spec = gated_modules(network), {"dit": spec}
        self.weights = weights(self.dense, self.spec)

    @property
    def plan(self) -> ExportPlan:
        """Of the unit alone."""
        return ExportPlan([self.dense], {})

    def scheduled(self, masks: np.ndarray) -> ExportPlan:
        """By a schedule."""
        return scheduled_plan(self.plan, self.modules, masks, self.spec)

    def first_skipped(self, count: int) -> np.ndarray:
        """The mask, bool `[modules]`, that skips the first `count`."""
        return np.arange(len(self.modules)) >= count


def static(lazy: Lazy, folder: pathlib.Path) -> dict[str, Callable[[], Any]]:
    """{"dense", "skip 0" ...: a call}. "dense" is a file of its own, without caches."""
    count = len(lazy.modules)
    masks = [lazy.first_skipped(k) for n in range(1, count + 1) for k in (0, n)]
    first, *others = lazy.scheduled(np.stack(masks)).units
    path = to_tflite(
        first.function, lazy.weights, first.inputs, first.name, folder / "static.tflite", "litert",
        {unit.name: (unit.function, unit.inputs) for unit in others},
    )  # fmt: skip
    dense = to_tflite(lazy.dense.function, lazy.weights, lazy.dense.inputs, "dit", folder / "dense.tflite", "litert")
    loaded: dict[pathlib.Path, Any] = {}
    calls = {"dense": _call(litert_unit(dense, "dit", 1), inputs(lazy.dense))}
    for k, unit in enumerate((first, *others)):
        calls[f"skip {k}"] = _call(litert_unit(path, unit.name, 1, loaded), inputs(unit))
    return calls


def adaptive(lazy: Lazy, folder: pathlib.Path) -> dict[str, Callable[[], Any]]:
    """{"skip 0" ...: a call} of one graph, told by tables of gates in which row k skips the first k modules."""
    count = len(lazy.modules)
    (unit,) = adaptive_plan(lazy.plan, lazy.modules, np.ones(count + 1, bool), None, lazy.spec).units
    limits = np.stack([np.where(lazy.first_skipped(k), -1.0, 1.0) for k in range(count + 1)]).astype(np.float32)
    widths = sum(unit.inputs[module].shape[-1] for module in lazy.modules)
    gates = {"kernels": np.zeros((count + 1, widths), np.float32), "limits": limits}
    params = {**lazy.weights, "gates": gates}
    path = to_tflite(unit.function, params, unit.inputs, unit.name, folder / "adaptive.tflite", "jax2tf")
    run, given = litert_unit(path, unit.name, 1), inputs(unit)
    return {
        f"skip {k}": _call(run, {**given, "step": np.eye(1, count + 1, k, dtype=np.float32)}) for k in range(count + 1)
    }


def _call(run: Callable[..., Any], given: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    return lambda: run(**given)


def by_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[Times, Times]:
    """Seconds, and seconds of processor time, of each call in every round; after one that is not counted."""
    wall: Times = {name: [] for name in calls}
    busy: Times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - used)
    return {n: t[1:] for n, t in wall.items()}, {n: t[1:] for n, t in busy.items()}


def summary(seconds: Times, cpu_seconds: Times, modules: int) -> dict[str, Any]:
    """Medians in ms, the line through them, and what half of the modules save."""
    wall, busy = ({n: 1e3 * float(np.median(x)) for n, x in one.items()} for one in (seconds, cpu_seconds))
    skipped = np.arange(modules + 1)
    found: dict[str, Any] = {"wall_ms": _rounded(wall), "cpu_ms": _rounded(busy)}
    for name, ms in (("wall", wall), ("cpu", busy)):
        at = np.array([ms[f"skip {k}"] for k in skipped])
        slope, start = np.polyfit(skipped, at, 1)
        left = at - (start + slope * skipped)
        dense = ms.get("dense", at[0])
        found[f"{name}_fit"] = {"ms_a_module": slope, "r2": 1 - left.var() / at.var()}
        found[f"{name}_half_of_dense"] = at[modules // 2] / dense
        found[f"{name}_schedule_half_of_dense"] = (at[0] + at[-1]) / 2 / dense
    return _rounded(found)


def _of_kind(kind: str, times: Times) -> Times:
    return {name.removeprefix(f"{kind} "): x for name, x in times.items() if name.startswith(f"{kind} ")}


def in_jax(lazy: Lazy, rounds: int) -> list[dict[str, Any]]:
    """A row for each share of skipped calls."""
    count, rows, calls = len(lazy.modules), [], {}
    params = jax.device_put(lazy.weights)
    for share in SHARES:
        masks = np.ones((STEPS, count), bool)
        masks[1::2] = lazy.first_skipped(round(2 * share * count))
        plan = lazy.scheduled(masks)
        units = {unit.name: unit for unit in plan.units}
        names = [step.get("unit", lazy.dense.name) for step in plan.program["steps"]]
        compiled = {name: jax.jit(unit.function).lower(params, **unit.inputs).compile() for name, unit in units.items()}
        flops = {name: _flops(program) for name, program in compiled.items()}
        rows.append({"share": share, "module_calls": int(masks.sum()), "gflops": sum(flops[n] for n in names) / 1e9})
        given = {name: jax.device_put(inputs(unit)) for name, unit in units.items()}
        calls[str(share)] = lambda c=compiled, g=given, n=names: [c[name](params, **g[name]) for name in n]
    wall, busy = by_turns(calls, rounds)
    for row in rows:
        name = str(row["share"])
        row |= {"seconds": float(np.median(wall[name])), "cpu_seconds": float(np.median(busy[name]))}
    return [_rounded(row) for row in rows]


def _flops(program: Any) -> float:
    """Of a compiled program, as XLA counts them."""
    return program.cost_analysis()["flops"]


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measures all networks."""
    parser = argparse.ArgumentParser(description="What skipped modules save.")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each graph")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="default: %(default)s")
    parser.add_argument("--jax", choices=("yes", "no"), default="yes", help="whether JAX is measured, too")
    parser.add_argument("--save", default="", help="name of the machine, for benchmarks/results/")
    options = parser.parse_args()
    about = {"machine": machine(), "commit": commit(), "rounds": options.rounds, "threads": 1}
    for name in options.networks.split(","):
        config, side = NETWORKS[name]
        lazy = Lazy(config, side)
        found: dict[str, Any] = {
            "network": name,
            "modules": len(lazy.modules),
            "tokens": side**2,
            "width": config.width,
        }
        with tempfile.TemporaryDirectory() as scratch:
            kinds = {"static": static(lazy, pathlib.Path(scratch)), "adaptive": adaptive(lazy, pathlib.Path(scratch))}
            named = {f"{kind} {n}": call for kind, calls in kinds.items() for n, call in calls.items()}
            times = by_turns(named, options.rounds)
        for kind in kinds:
            found[kind] = summary(_of_kind(kind, times[0]), _of_kind(kind, times[1]), len(lazy.modules))
        if options.jax == "yes":
            found["jax"] = {"steps": STEPS, "rows": in_jax(lazy, max(3, options.rounds // 4))}
        append({**found, **about}, "lazy_latency", options.save)


if __name__ == "__main__":
    main()
