"""The account of a run's time over its restarts."""

import signal
import subprocess
import sys
import types

import pytest
from etils import epath

from snapgen_jax.training import lifetime
from snapgen_jax.training.lifetime import Lifetime


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves on."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(lifetime, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_seconds_by_phase_are_kept_over_restarts_and_lost_work_is_named(tmp_path, clock):
    path = epath.Path(tmp_path) / "goodput.json"
    first = Lifetime(path, began=clock.now - 7)  # Python, JAX and the data took seven seconds
    clock.now += 2
    with first.phase("compile"):
        clock.now += 20
    with first.phase("data"):
        clock.now += 1
    with first.phase("step"):
        clock.now += 30
        with first.phase("checkpoint"):
            clock.now += 3
    first.store(10)
    with first.phase("step"):
        clock.now += 100  # a kill: never stored

    second = Lifetime(path, began=clock.now - 5)
    second.charge_lost_work(8)  # of ten updates on the account two must be made again
    with second.phase("step"):
        clock.now += 6
    with second.phase("evaluation"):
        clock.now += 4
    goodput = second.goodput()
    share = goodput.pop("goodput")
    assert goodput == pytest.approx(
        {"init": 9 + 5, "compile": 20, "step": 24 + 6, "data": 1, "evaluation": 4, "checkpoint": 3, "lost": 6}
    )
    assert share == pytest.approx(30 / (14 + 20 + 30 + 1 + 4 + 3 + 6))


def test_nothing_is_lost_where_nothing_was_made_after_the_restored_update(tmp_path, clock):
    path = epath.Path(tmp_path) / "goodput.json"
    first = Lifetime(path)
    with first.phase("step"):
        clock.now += 30
    first.store(10)
    second = Lifetime(path)
    second.charge_lost_work(10)
    assert second.goodput()["lost"] == 0 and second.goodput()["step"] == 30


STUCK = """
import signal, sys, time
from etils import epath
from snapgen_jax.training.lifetime import Lifetime
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would inherit that it is ignored
life = Lifetime(epath.Path(sys.argv[1]) if len(sys.argv) > 1 else None)
with life.watch(), life.phase("step"):
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.1)
"""


@pytest.mark.parametrize("has_workdir", [True, False])
def test_the_second_ctrl_c_quits_at_once_and_without_a_workdir_the_first(tmp_path, has_workdir):
    arguments = [str(tmp_path / "goodput.json")] if has_workdir else []
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    if not has_workdir:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
        return
    assert "SIGINT in phase step: stopping, with everything saved; press Ctrl-C again" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "quitting at once" in errors
