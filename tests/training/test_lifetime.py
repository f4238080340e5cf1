"""The account of a run's time over its restarts."""

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
