"""The phases of a run's life: where its seconds go, and what a signal may interrupt.

    with life.phase("evaluation"):
        ...

In `idle` phases nothing is unsaved (a save precedes every evaluation), so a SIGTERM ends the process there and then. In
the others the signal is noted, the phase is finished, and the loop stops before its next update.

To a run with a workdir the first Ctrl-C (SIGINT) is a SIGTERM, and the second one quits at once.

Of several processes any one may get the signal, and all stop after the same update: each posts the last update that it
has begun, and the greatest of these is the last of the run. No process begins another before all have posted.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from snapgen_jax.parallel.hosts import Cluster, Notes, current
from snapgen_jax.training.exits import ExitCode
from snapgen_jax.training.files import write_whole

IDLE = frozenset({"init", "compile", "evaluation"})
PHASES = ("init", "compile", "step", "data", "evaluation", "checkpoint")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_INTERRUPTED = 128 + signal.SIGINT
_EXIT_SECONDS = 60.0


class Lifetime:
    """Accounts for the time of a run over all of its restarts, and turns signals into a clean end of all processes.

    Attributes:
        stopping: the run was asked to stop, by a signal to this process or to another.
    """

    def __init__(
        self,
        path: epath.Path | None = None,
        on_idle_exit: Callable[[], None] = lambda: None,
        cluster: Cluster | None = None,
        stall_seconds: float = 0.0,
        began: float | None = None,
    ):
        """Nothing is watched before `watch`.

        Args:
            path: keeps the account between restarts; of several processes the first one keeps it.
            on_idle_exit: runs before the process ends in an idle phase.
            cluster: the processes of the run; by default those that `hosts.start` found.
            stall_seconds: report a phase that lasts longer, with the stacks of all threads; 0 reports none.
            began: when the run's process began, on the clock of `time.monotonic`; the time since then went into "init".
                By default, now.
        """
        self._cluster = current() if cluster is None else cluster
        self._path = path if self._cluster.index == 0 else None
        # Where nothing is saved, or a person has the prompt, Ctrl-C is Python's own.
        self._signals = SIGNALS if path is not None and not _is_interactive() else (signal.SIGTERM,)
        self._interrupts = 0
        self._on_idle_exit = on_idle_exit
        self._stall_seconds = stall_seconds
        self._lock = threading.Condition()
        self.stopping = False
        self._begun = self._saved = 0
        self._posted = False
        self._last: int | None = None
        self._phase = "init"
        self._since = self._entered = time.monotonic()
        self._reported = False
        self._seconds: dict[str, float] = dict.fromkeys(map(str, PHASES), 0.0)
        if began is not None:
            self._seconds["init"] = self._since - began
        self._earlier: dict[str, float] = {}
        if path is not None and path.exists():
            self._earlier = json.loads(path.read_text())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the time inside to `name`; phases nest, and the inner one is charged."""
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> str:
        now = time.monotonic()
        self._charge(now)
        outer, self._phase, self._entered, self._reported = self._phase, name, now, False
        return outer

    def _charge(self, now: float) -> None:
        self._seconds[self._phase] += now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Seconds by phase in this process, the current phase included."""
        self._charge(time.monotonic())
        return dict(self._seconds)

    def goodput(self) -> dict[str, float]:
        """Seconds by phase over all restarts, `lost` among them, and `goodput`, the share spent in steps."""
        total = {name: self._earlier.get(name, 0.0) + s for name, s in self.seconds().items()}
        total["lost"] = self._earlier.get("lost", 0.0)
        whole = sum(total.values())
        return {**total, "goodput": total["step"] / whole if whole else 0.0}

    def charge_lost_work(self, restored: int) -> None:
        """Moves the time of the updates after number `restored`, which must be made again, from `step` to `lost`."""
        done = self._earlier.get("steps_done", 0.0)
        if done > restored:
            share = self._earlier["step"] * (done - restored) / done
            self._earlier["step"] -= share
            self._earlier["lost"] += share

    def store(self, steps_done: int) -> None:
        """Writes the account, atomically."""
        if self._path is None:
            return
        account = self.goodput()
        del account["goodput"]
        write_whole(self._path, json.dumps({**account, "steps_done": steps_done}))

    def together(self, what: str) -> None:
        """Waits until every process of the run has come to the point of that name."""
        try:
            self._cluster.barrier(what)
        except Exception:
            if not self.stopping:
                raise
            time.sleep(_EXIT_SECONDS)  # the others are leaving, and so is this one, in the cluster's thread

    # --- the end ---

    def saved(self, step: int) -> None:
        """Says that update number `step` is saved, or being saved: the restored one, and those that `save` is for."""
        self._saved = step
        self._begun = max(self._begun, step)

    def begin(self, step: int) -> bool:
        """The look for preemption: whether update number `step` may begin. All processes get the same answer."""
        with self._lock:
            if not self._posted:
                self._begun = step
                return True
            while self._last is None:
                self._lock.wait()
            if step > self._last:
                self._phase = "checkpoint"  # the main thread ends the run from here on, not the cluster's
            return step <= self._last

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Handles signals and stalls inside. Outside the main thread, where Python allows no handler, only stalls and
        the signals of other processes."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            # The handler does nothing: that it is there is what makes the signal known to the cluster's thread.
            before = {number: signal.signal(number, lambda number, frame: None) for number in self._signals}
        try:
            with self._cluster.listen(self._look):
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look(self, notes: Notes, signals: list[int]) -> None:
        """Runs several times a second, in the cluster's thread."""
        self._report_stall()
        came = [signal.Signals(number).name for number in signals if number in self._signals]
        self._interrupts += came.count("SIGINT")
        if self._interrupts > 1:
            print("interrupted twice: quitting at once; what was saved before stays", file=sys.stderr, flush=True)
            os._exit(_INTERRUPTED)
        asked = notes.get("stop")
        if not self.stopping and (came or asked):
            self.stopping = True
            why = f"signal {came[0]}" if came else f"process {asked} was told to stop"
            more = ", with everything saved; press Ctrl-C again to quit at once" if self._interrupts else ""
            print(f"{why} in phase {self._phase}: stopping{more}", file=sys.stderr, flush=True)
            if not asked:
                self._cluster.post("stop", str(self._cluster.index))
        if not self.stopping:
            return
        with self._lock:
            if not self._posted:
                self._cluster.post(f"begun/{self._cluster.index}", str(self._begun))
                self._posted = True
        begun = [int(text) for name, text in self._cluster.notes().items() if name.startswith("begun/")]
        if len(begun) == self._cluster.count:
            with self._lock:
                self._last = max(begun)
                self._lock.notify_all()
                if self._phase in IDLE and self._begun == self._saved == self._last:
                    self._exit()

    def _exit(self) -> None:
        """Ends the process now: everything is saved, and a compilation or an evaluation is not worth finishing."""
        self._on_idle_exit()
        self.store(self._begun)
        self._cluster.leave()
        os._exit(ExitCode.PREEMPTED)

    def _report_stall(self) -> None:
        lasted = time.monotonic() - self._entered
        if not self._stall_seconds or self._reported or lasted < self._stall_seconds:
            return
        self._reported = True
        where = f"process {self._cluster.index} of {self._cluster.count}"
        print(
            f"{where} has been in phase {self._phase} (step {self._begun}) for {lasted:.0f} s, longer than "
            f"stall_seconds={self._stall_seconds:g}. What its threads are doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)


def _is_interactive() -> bool:
    """Whether a person types into this process: a prompt of Python, or a notebook."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or "ipykernel" in sys.modules
