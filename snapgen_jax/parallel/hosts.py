"""Several processes as one run: how they start, what they tell each other, and how one's failure ends all.

A pod is one process a host. `start` forms the cluster or says why it did not form; from then on the processes leave
notes for each other on the board of JAX's coordination service, which works while devices compute, compile or hang.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

START_TIMEOUT_SECONDS = 1800  # a cold pod takes more than JAX's 300 s to come up as a whole
_LOOK_SECONDS = 0.25
_BEAT_SECONDS = 2.0
_SILENCE_SECONDS = 30.0  # a process that posts nothing for so long is gone; jax itself would abort after 100 s
_LAST_WORDS_SECONDS = 10.0
Notes = Mapping[str, str]


class ClusterError(ValueError):
    """The cluster is not the one that was asked for."""


class Cluster:
    """The processes of a run and their board of notes. One process alone is a cluster of one.

    Attributes:
        index: of this process, 0 to count - 1.
        count: processes in the run.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None):
        """`client` is that of JAX's coordination service; None keeps the board in this process."""
        self.index, self.count, self._client = index, count, client
        self._own: dict[str, str] = {}
        self._listeners: list[Callable[[Notes, list[int]], None]] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._wakeup: tuple[int, int] | None = None
        self._beats = 0
        self._heard: dict[str, tuple[str, float]] = {}

    # --- the board ---

    def post(self, name: str, text: str) -> None:
        """Leaves a note for all; an earlier one of the same name is replaced."""
        if self._client is None:
            self._own[name] = text
        else:
            self._client.key_value_set(f"snapgen/{name}", text, allow_overwrite=True)

    def notes(self) -> dict[str, str]:
        """All notes there are."""
        if self._client is None:
            return dict(self._own)
        return {key.removeprefix("snapgen/"): text for key, text in self._client.key_value_dir_get("snapgen/")}

    def barrier(self, name: str, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Waits until every process has come to the barrier of that name. A name serves once."""
        if self._client is not None:
            self._client.wait_at_barrier(f"snapgen/{name}", int(1000 * timeout_seconds))

    # --- listening ---

    @contextlib.contextmanager
    def listen(self, listener: Callable[[Notes, list[int]], None]) -> Iterator[None]:
        """Calls `listener(notes, signals)` several times a second, in a thread, until the end of the `with`.

        `signals` are the numbers of the signals that came since; they are known even while the main thread is inside
        a compilation or waits for a device, when Python itself runs no signal handler.
        """
        with self._lock:
            self._listeners.append(listener)
            if self._thread is None:
                self._end = threading.Event()
                self._thread = threading.Thread(target=self._look, name="snapgen-cluster", daemon=True)
                self._thread.start()
        with self._signals_wake():
            try:
                yield
            finally:
                with self._lock:
                    self._listeners.remove(listener)
                    if not self._listeners:
                        self._end.set()
                        self._thread = None
                        with contextlib.suppress(Exception):
                            self.post(f"alive/{self.index}", "left")

    @contextlib.contextmanager
    def _signals_wake(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread() or self._wakeup is not None:
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        self._wakeup = (reading, writing)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            with self._lock:
                self._wakeup = None
                os.close(writing)
                os.close(reading)

    def _look(self) -> None:
        end = self._end
        while not end.is_set():
            signals = self._came(_LOOK_SECONDS)
            try:
                self._beat()
                notes = self.notes()
                self._heed_failure(notes)
                lost = self._lost(notes)
                if lost:
                    self._end_for_lost(lost)
                with self._lock:
                    listeners = list(self._listeners)
                for listener in listeners:
                    listener(notes, signals)
            except Exception as error:
                if end.is_set():
                    return
                lost = f"the board of process 0 cannot be reached ({error})" if self.count > 1 else repr(error)
                _exit_now(f"process {self.index} of {self.count} ends: {lost}", 69)

    def _beat(self) -> None:
        now = int(time.monotonic() / _BEAT_SECONDS)
        if self.count > 1 and now != self._beats:
            self._beats = now
            self.post(f"alive/{self.index}", str(now))

    def _lost(self, notes: Notes) -> str:
        """The number of a process that has posted nothing for too long, or ""."""
        now = time.monotonic()
        for name, text in notes.items():
            if not name.startswith("alive/") or name == f"alive/{self.index}" or text == "left":
                continue
            before, since = self._heard.get(name, ("", now))
            self._heard[name] = (text, now if text != before else since)
            if now - self._heard[name][1] > _SILENCE_SECONDS:
                return name.removeprefix("alive/")
        return ""

    def _end_for_lost(self, number: str) -> None:
        _exit_now(
            f"process {number} has not been heard of for {_SILENCE_SECONDS:.0f} s, so process {self.index} of "
            f"{self.count} ends too; run the same command to go on from the newest checkpoint",
            69,
        )

    def _came(self, seconds: float) -> list[int]:
        pipe = self._wakeup
        if pipe is None:
            time.sleep(seconds)
            return []
        with contextlib.suppress(OSError):  # it was closed meanwhile, or nothing came
            select.select([pipe[0]], [], [], seconds)
            with self._lock:  # the number of a closed pipe is that of the next file opened, whose bytes are not ours
                if self._wakeup == pipe:
                    return list(os.read(pipe[0], 1024))
        return []

    # --- ends ---

    def fail(self, code: int, text: str) -> None:
        """Tells all processes that this one has failed and why; they print it and end with `code`."""
        if self.count == 1:
            return
        with contextlib.suppress(Exception):
            self.post(f"failure/{self.index}", f"{code}\n{text}")
            deadline = time.monotonic() + _LAST_WORDS_SECONDS
            while time.monotonic() < deadline:  # the board goes when its process goes, so stay until all have read
                if sum(name.startswith("heard/") for name in self.notes()) == self.count - 1:
                    return
                time.sleep(_LOOK_SECONDS)

    def explain_lost_peer(self) -> None:
        """After an operation with other processes failed: ends this one with the reason, if another is to blame."""
        deadline = time.monotonic() + _SILENCE_SECONDS + 2 * _BEAT_SECONDS
        while self.count > 1 and time.monotonic() < deadline:
            try:
                notes = self.notes()
            except Exception as error:
                _exit_now(f"process {self.index} of {self.count} ends: process 0 cannot be reached ({error})", 69)
            self._heed_failure(notes)
            lost = self._lost(notes)
            if lost:
                self._end_for_lost(lost)
            time.sleep(_LOOK_SECONDS)

    def _heed_failure(self, notes: Notes) -> None:
        others = [name for name in notes if name.startswith("failure/") and name != f"failure/{self.index}"]
        if not others or f"failure/{self.index}" in notes:
            return
        code, _, text = notes[others[0]].partition("\n")
        number = others[0].removeprefix("failure/")
        self.post(f"heard/{self.index}", "")
        if self.index == 0:
            time.sleep(2 * _LOOK_SECONDS + 1.0)  # its board goes with it, and the others would be aborted
        _exit_now(f"process {number} of {self.count} failed, so process {self.index} ends too:\n{text}", int(code))

    def leave(self) -> None:
        """Waits for all processes to come to their end, so that none takes another's leaving for a failure."""
        if self.count > 1 and self._client is not None:
            self._client = None
            self._end.set()
            jax.distributed.shutdown()


def _exit_now(text: str, code: int) -> None:
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


_ALONE = Cluster()
_current = _ALONE


def current() -> Cluster:
    """The cluster that `start` formed; one process alone if it was not called."""
    return _current


def processes_in_sight(environment: Mapping[str, str]) -> int:
    """How many processes the environment (Cloud TPU, SLURM, Open MPI) says that this run has; 1 if it says nothing."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    slices = int(environment.get("MEGASCALE_NUM_SLICES", "1"))
    counts = [len(names.split(",")) * slices, *(environment.get(n) for n in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))]
    return max(int(count) for count in counts if count)


def start(
    processes: int | None = None,
    coordinator: str | None = None,
    index: int | None = None,
    timeout_seconds: int = START_TIMEOUT_SECONDS,
) -> Cluster:
    """Forms the cluster. Call it before anything touches a device.

    Args:
        processes: how many must come; None for as many as the environment says.
        coordinator: "host:port" of process 0; None where JAX finds it (Cloud TPU, GKE, SLURM, Open MPI).
        index: of this process; goes with `coordinator`.
        timeout_seconds: how long to wait for the others.

    Raises:
        ClusterError: another number of processes came, or is announced, than was expected.

    Processes that wait in vain for the others end with the reason and the exit code of failed infrastructure.
    """
    global _current
    by_hand, announced = coordinator is not None, processes_in_sight(os.environ)
    if by_hand != (index is not None) or (by_hand and processes is None):
        raise ClusterError(
            f"coordinator={coordinator}, processes={processes}, index={index}: to form a cluster by hand give all "
            "three; on Cloud TPU, GKE and SLURM give at most the number of processes"
        )
    if not by_hand and processes is not None and announced not in (1, processes):
        raise ClusterError(
            f"{processes} processes are expected and the environment announces {announced}: start as many as "
            "--processes says, or correct it"
        )
    expected = announced if processes is None else processes
    if expected > 1:
        _current = _form(expected, coordinator, index, timeout_seconds)
    if jax.process_count() != expected:
        raise ClusterError(
            f"{expected} processes are expected and {jax.process_count()} came: start as many as --processes says, or "
            "correct it"
        )
    here, everywhere = jax.local_device_count(), jax.device_count()
    kind = jax.devices()[0].device_kind
    print(f"process {_current.index} of {_current.count}: {here} of {everywhere} devices ({kind})", flush=True)
    return _current


def text_for_all(text: str) -> str:
    """The text that the first process gives, in every process; all call this at the same point."""
    if _current.count == 1:
        return text
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode() if _current.index == 0 else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = data if _current.index == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes().decode()


def _form(expected: int, coordinator: str | None, index: int | None, timeout_seconds: int) -> Cluster:
    where = coordinator or "process 0"

    def give_up() -> None:  # before jax does, which would abort the process
        _exit_now(
            f"the cluster of {expected} processes did not form within {timeout_seconds} s. Are all hosts up, does each "
            f"run the same command, and can they reach {where} (one TCP port)?",
            69,
        )

    timer = threading.Timer(timeout_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            expected if coordinator is not None else None,
            index,
            initialization_timeout=timeout_seconds + 60,
            shutdown_timeout_seconds=120,
        )
    except (RuntimeError, ValueError) as error:
        raise ClusterError(
            f"{expected} processes are expected and no cluster formed around {where}: {error}. Where JAX finds no "
            "cluster, give each process --coordinator and --index"
        ) from error
    finally:
        timer.cancel()
    from jax._src import distributed  # the client has no public name; orbax takes it from here too

    return Cluster(jax.process_index(), jax.process_count(), distributed.global_state.client)
