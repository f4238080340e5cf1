"""Kills a process at moments spread over the time that a save takes, and restores what is left.

    python -m benchmarks.crash_in_save --kills=200

After every kill the newest checkpoint that is offered must restore whole, to the very numbers that were saved at its
step. Writes `results/crash_in_save.json`: how often a save was torn, and how often the older or the newer checkpoint
was the newest whole one.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np

from benchmarks.measuring import machine
from snapgen_jax.training.checkpoint import CheckpointConfig, Checkpointer, complete_steps
from snapgen_jax.training.state import Player, TrainState

RESULT = pathlib.Path(__file__).parent / "results" / "crash_in_save.json"
ARRAYS, SIDE = 40, 64
REHEARSALS = 3


def state(step: int) -> TrainState:
    """A state whose every number is its step."""
    params = {f"kernel_{i:02d}": np.full((SIDE, SIDE), step, np.float32) for i in range(ARRAYS)}
    players = {"model": Player(params, {"count": np.int32(step)}, {k: v + 0.5 for k, v in params.items()})}
    return TrainState(cast(Any, np.int32(step)), cast(Any, np.int32(0)), players, {})


def save_two(workdir: pathlib.Path, say: int) -> None:
    """Saves step 1, then step 2; writes a byte to the pipe `say` when each save begins and when it is done."""
    checkpointer = Checkpointer(workdir, CheckpointConfig(keep_last=2))
    for step in (1, 2):
        os.write(say, b"b")
        checkpointer.save(jax.tree.map(jax.numpy.asarray, state(step)), 10 * step, {"seed": 0})
        checkpointer.wait()
        os.write(say, b"d")
    checkpointer.close()


def run(workdir: pathlib.Path, kill_after: float | None) -> float:
    """Forks a process that saves twice; kills it `kill_after` seconds into the second save, or lets it end.

    Returns:
        How long the second save took, or 0 where it was not let to end.
    """
    reading, writing = os.pipe()
    child = os.fork()  # jax is imported and has started no thread yet: a start from nothing would take seconds
    if child == 0:
        os.close(reading)
        try:
            save_two(workdir, writing)
        finally:
            os._exit(0)
    os.close(writing)
    for expected in (b"b", b"d", b"b"):
        assert os.read(reading, 1) == expected
    begin = time.perf_counter()
    if kill_after is None:
        assert os.read(reading, 1) == b"d"
    else:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    took = time.perf_counter() - begin
    os.waitpid(child, 0)
    os.close(reading)
    return 0.0 if kill_after is not None else took


def rehearse(folder: pathlib.Path) -> float:
    """The median time of a save, in seconds."""
    return statistics.median(run(folder / f"rehearsal_{i}", None) for i in range(REHEARSALS))


def kills(folder: pathlib.Path, count: int, window: float) -> Iterator[pathlib.Path]:
    """Workdirs of processes that were killed at `count` moments spread over a save of `window` seconds and just after
    it."""
    for i in range(count):
        workdir = folder / f"kill_{i:03d}"
        run(workdir, 1.1 * window * (i + 0.5) / count)
        yield workdir


def is_torn(workdir: pathlib.Path) -> bool:
    """Whether the second save left a part of itself behind."""
    return {p.name for p in (workdir / "checkpoints").iterdir()} != set(map(str, complete_steps(workdir)))


def restore(workdir: pathlib.Path) -> tuple[int, Any]:
    """The newest checkpoint that is offered: its step and its state.

    Raises:
        AssertionError: it is not the state that was saved at that step.
    """
    checkpointer = Checkpointer(workdir)
    step = checkpointer.latest_step()
    assert step is not None
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state(0))
    restored, position = checkpointer.restore(spec, step)
    checkpointer.close()
    assert position == 10 * step
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    return step, restored


def main() -> None:
    """Kills, then restores all that is left, in this order: restoring starts threads, and forking comes before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    arguments = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        window = rehearse(folder)
        workdirs = list(kills(folder, arguments.kills, window))
        torn = sum(map(is_torn, workdirs))
        newest = collections.Counter(restore(workdir)[0] for workdir in workdirs)
    finally:
        shutil.rmtree(folder)
    record = {
        "kills": arguments.kills,
        "save_seconds": window,
        "torn_saves": torn,
        "newest_whole_checkpoint": {f"step_{step}": count for step, count in sorted(newest.items())},
        "restored_whole": sum(newest.values()),
        "machine": machine(),
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
