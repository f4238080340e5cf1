"""What a person watching a run wants to know, and the bookkeeping behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.parallel.chips import Roofline
from snapgen_jax.training.exits import ConfigError

Tree = Any


def records(unlogged: Sequence[tuple[int, np.ndarray, Mapping[str, jax.Array]]]) -> tuple[list[dict], dict[str, float]]:
    """Fetches metrics in one transfer -> one plain record a step, and the means over finite steps."""
    fetched = jax.device_get([metrics for _, _, metrics in unlogged])
    out = []
    for (step, _, _), metrics in zip(unlogged, fetched, strict=True):
        values = {k: bool(v) if v.dtype == np.bool_ else float(v) for k, v in sorted(metrics.items())}
        out.append({"step": step, **values})
    good = [r for r in out if r["finite"]]
    keys = [k for k in (out[-1] if out else {}) if k not in ("step", "finite")]
    return out, {k: float(np.mean([r[k] for r in good])) for k in keys if good}


def check_batch_arrays(arrays: Mapping[str, np.ndarray], spec: Mapping[str, jax.ShapeDtypeStruct], hosts: int) -> None:
    """Refuses a batch whose arrays are not those the recipe compiled for, naming the first that differs."""
    for name in sorted(set(arrays) | set(spec)):
        want = (
            None if name not in spec else ((spec[name].shape[0] // hosts, *spec[name].shape[1:]), str(spec[name].dtype))
        )
        have = None if name not in arrays else (tuple(arrays[name].shape), str(arrays[name].dtype))
        if want != have:
            raise ConfigError(
                f"batch array {name!r}: the recipe expects {want or 'none'}, the data gave {have or 'none'}"
            )


def close(stream: Any) -> None:
    """Ends an iterator's workers, where it has any."""
    if hasattr(stream, "close"):
        stream.close()


def duration(seconds: float) -> str:
    """ "3d04h", "2h05m", "4m10s" or "9s"."""
    s = round(seconds)
    if s >= 86400:
        return f"{s // 86400}d{s % 86400 // 3600:02d}h"
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def evaluation_line(step: int, name: str, numbers: Mapping[str, float]) -> str:
    """One line with an evaluator's first few numbers."""
    return " | ".join([f"evaluation {name} at step {step:,}", *(f"{k} {v:.4g}" for k, v in list(numbers.items())[:6])])


class Reporter:
    """Counts examples and turns intervals into lines."""

    def __init__(self, train_steps: int, start_step: int, quiet: bool):
        self.train_steps, self.start_step, self.quiet = train_steps, start_step, quiet
        self._examples = 0
        self._at_best = [0.0, 0.0]  # seconds of arithmetic, and of the tightest resource, in this interval
        self._step = start_step
        self._seconds: Mapping[str, float] | None = None
        self._time = time.monotonic()

    def line(self, text: str) -> None:
        """Prints a line."""
        if not self.quiet:
            print(text, flush=True)

    def start(self, table: str, mesh: Mesh, step: int) -> None:
        """Prints where everything lies, and where the run begins."""
        if self.quiet:
            return
        print(table)
        axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
        begin = f"resuming at step {step:,}" if step else "starting from nothing"
        print(f"mesh {axes} on {mesh.size} {jax.devices()[0].device_kind} devices; {begin}", flush=True)
        for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
            if os.environ.get(name):
                print(f"{name}={os.environ[name]}", flush=True)

    def peaks(self, rooflines: Sequence[Roofline | None]) -> None:
        """Prints what the utilisation in the progress line is a share of, where the device's peaks are known."""
        known = [found for found in rooflines if found is not None]
        if known and not self.quiet:
            chip = known[0].chip
            print(
                f"MFU: XLA's count of operations, recomputation included, over {chip.flops / 1e12:g} TFLOP/s (dense "
                f"bfloat16, one {chip.name} chip). roof: the time at that peak or at {chip.hbm_bandwidth / 1e9:g} GB/s "
                f"of memory, whichever is longer, over the time taken. Here the step is bound by {known[0].bound}.",
                flush=True,
            )

    def count(self, examples: int, roofline: Roofline | None = None) -> None:
        """Adds one update: its examples, and what it takes at best."""
        self._examples += examples
        if roofline is not None:
            self._at_best[0] += roofline.times["compute"]
            self._at_best[1] += roofline.seconds

    def interval(
        self, step: int, means: Mapping[str, float], seconds: Mapping[str, float], saved_step: int
    ) -> tuple[str, dict[str, float]]:
        """The progress line and the perf record of the interval that ends at `step`."""
        now = time.monotonic()
        before = self._seconds or dict.fromkeys(seconds, 0.0)
        spent = {name: seconds[name] - before[name] for name in ("step", "data")}
        steps, busy = step - self._step, max(1e-9, spent["step"] + spent["data"])
        rate = self._examples / busy
        perf = {
            "step": step,
            "examples_per_second": rate,
            "step_seconds": busy / steps,
            "data_wait_share": spent["data"] / busy,
            "time": time.time(),
        }
        used = ""
        if self._at_best[1]:
            perf["mfu"], perf["roofline_share"] = (seconds / busy for seconds in self._at_best)
            used = f"MFU {100 * perf['mfu']:.0f}% roof {100 * perf['roofline_share']:.0f}% | "
            self._at_best = [0.0, 0.0]
        left = (self.train_steps - step) * (now - self._time) / steps
        self._seconds, self._step, self._examples, self._time = dict(seconds), step, 0, now
        shown = "".join(f"{k} {means[k]:.4g} | " for k in ("loss", "grad_norm") if k in means)
        saved = f" | ckpt {saved_step:,}" if saved_step >= 0 else ""
        line = (
            f"step {step:,}/{self.train_steps:,} {100 * step / self.train_steps:.1f}% | {shown}"
            f"{rate:,.0f} examples/s | {1000 * perf['step_seconds']:.1f} ms | {used}"
            f"data {100 * perf['data_wait_share']:.1f}% | ETA {duration(left)}{saved}"
        )
        return line, perf
