"""The phases of a run's life: where its seconds go, and what a signal may interrupt.

    with life.phase("evaluation"):
        ...

In `idle` phases nothing is unsaved (a save precedes every evaluation), so a SIGTERM ends the process there and then. In
the others the signal is noted, the phase is finished, and the loop stops at its next look.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from etils import epath

from snapgen_jax.training.exits import ExitCode
from snapgen_jax.training.files import write_whole

IDLE = frozenset({"init", "compile", "evaluation"})
PHASES = ("init", "compile", "step", "data", "evaluation", "checkpoint")
SIGNALS = (signal.SIGTERM,)


class Lifetime:
    """Accounts for the time of a run over all of its restarts, and turns signals into a clean end.

    Attributes:
        preempted: a signal has asked the run to stop.
    """

    def __init__(self, path: epath.Path | None = None, on_idle_exit: Callable[[], None] = lambda: None):
        """`path` keeps the account between restarts; `on_idle_exit` runs before the process ends in an idle phase."""
        self.preempted = False
        self._path = path
        self._on_idle_exit = on_idle_exit
        self._phase = "init"
        self._since = time.monotonic()
        self._seconds: dict[str, float] = dict.fromkeys(map(str, PHASES), 0.0)
        self._earlier: dict[str, float] = {}
        if path is not None and path.exists():
            self._earlier = json.loads(path.read_text())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the time inside to `name`; phases nest, and the inner one is charged."""
        outer = self._enter(name)
        try:
            if self.preempted and name in IDLE:
                self._exit()
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> str:
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        self._since, outer, self._phase = now, self._phase, name
        return outer

    def seconds(self) -> dict[str, float]:
        """Seconds by phase in this process, the current phase included."""
        self._enter(self._phase)
        return dict(self._seconds)

    def goodput(self) -> dict[str, float]:
        """Seconds by phase over all restarts, `lost` among them, and `goodput`, the share spent in steps."""
        total = {name: self._earlier.get(name, 0.0) + s for name, s in self.seconds().items()}
        total["lost"] = self._earlier.get("lost", 0.0)
        whole = sum(total.values())
        return {**total, "goodput": total["step"] / whole if whole else 0.0}

    def charge_lost_work(self, steps: int) -> None:
        """Moves the time of steps that a restart must repeat from `step` to `lost`."""
        done = self._earlier.get("steps_done", 0.0)
        if steps > 0 and done > 0:
            share = self._earlier.get("step", 0.0) * min(1.0, steps / done)
            self._earlier["step"] -= share
            self._earlier["lost"] = self._earlier.get("lost", 0.0) + share

    def store(self, steps_done: int) -> None:
        """Writes the account, atomically."""
        if self._path is None:
            return
        account = self.goodput()
        del account["goodput"]
        write_whole(self._path, json.dumps({**account, "steps_done": steps_done}))

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handles the signals inside; does nothing outside the main thread, where Python allows no handler."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        first, self.preempted = not self.preempted, True
        if first:
            print(f"signal {signal.Signals(number).name} in phase {self._phase}: stopping", file=sys.stderr, flush=True)
            if self._phase in IDLE:
                self._exit()

    def _exit(self) -> None:
        """Ends the process now: everything is saved, and a compilation or an evaluation is not worth finishing."""
        self._on_idle_exit()
        os._exit(ExitCode.PREEMPTED)
