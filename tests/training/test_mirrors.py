"""Mirrors of the metrics: offline modes of the services, one run over restarts, and no way to end a run."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import types

import numpy as np
import pytest

from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.loop import LoopConfig, train
from snapgen_jax.training.metrics import MetricWriter
from snapgen_jax.training.mirrors import MirrorConfig
from tests.event_files import read_events
from tests.recipes_for_tests import Sequences, TwoPlayers

PICTURE = {"samples": np.full((8, 8, 3), 100, np.uint8)}


def live(workdir, steps, kind="trackio"):
    """One life of a run: resumed at `steps[0]`, logged every 10 updates up to `steps[1]`."""
    writer = MetricWriter(workdir, steps[0], tensorboard=False, mirror=MirrorConfig(kind, "shapes"))
    for step in range(steps[0] + 10, steps[1] + 1, 10):
        writer.train([{"step": n, "finite": True, "loss": 1.0 * n} for n in range(step - 9, step + 1)])
        writer.perf({"step": step, "examples_per_second": 7.0})
    writer.evaluation(steps[1], "grid", {"score": 0.5}, PICTURE)
    writer.close()


class Service(types.ModuleType):
    """A service's package, with a memory in place of a network."""

    def __init__(self):
        super().__init__("trackio")
        self.runs, self.fails = {}, set()

    def _call(self, what):
        if what in self.fails:
            raise ConnectionError(f"{what}: no route to host")

    def Image(self, picture):
        return ("image", picture.shape)

    def init(self, *, project, name, resume, config, embed):
        self._call("init")
        assert resume == "allow" and not embed
        logged = self.runs.setdefault((project, name), [])

        def log(values, step):
            self._call("log")
            logged.extend((step, key, value) for key, value in values.items())

        return types.SimpleNamespace(log=log, finish=lambda: self._call("finish"))


@pytest.fixture
def service(monkeypatch):
    module = Service()
    module.__spec__ = importlib.util.spec_from_loader("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_a_resumed_run_continues_the_same_run_of_the_service(tmp_path, service):
    live(tmp_path / "run", (0, 20))
    live(tmp_path / "run", (20, 40))
    live(tmp_path / "other", (0, 10))
    (run, logged), (other, _) = service.runs.items()
    assert run[0] == "shapes" and run[1].startswith("run-") and other[1].startswith("other-")
    losses = [(step, value) for step, key, value in logged if key == "train/loss"]
    assert losses == [(10, 5.5), (20, 15.5), (30, 25.5), (40, 35.5)]
    assert (40, "samples", ("image", (8, 8, 3))) in logged and (20, "evaluation/score", 0.5) in logged


@pytest.mark.parametrize("fails", [{"init"}, {"log"}, {"finish"}, {"log", "finish"}])
def test_a_service_that_fails_is_logged_once_and_ends_no_run(tmp_path, service, caplog, fails):
    service.fails = fails
    live(tmp_path, (0, 50))
    lines = (tmp_path / "metrics" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 50
    (record,) = caplog.records
    assert "the mirror trackio fails, and the run goes on without it: ConnectionError" in record.getMessage()


def test_a_package_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = TwoPlayers()
    with pytest.raises(ConfigError, match=r'needs the package wandb.*install "snapgen-jax\[mirrors\]", or set'):
        train(recipe, Sequences(recipe), LoopConfig(mirror=MirrorConfig("wandb")), workdir=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_tensorboard_on_a_disk_hides_the_events_of_lost_updates(tmp_path):
    for first, last in ((0, 40), (20, 60)):
        writer = MetricWriter(tmp_path, first)
        for step in range(first + 10, last + 1, 10):
            writer.train([{"step": n, "finite": True, "loss": 1.0 * n} for n in range(step - 9, step + 1)])
        writer.evaluation(last, "grid", {"score": 0.5}, PICTURE)
        writer.close()
    events = read_events(tmp_path / "tensorboard")
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30, 40, 50, 60]


def lives_of(tmp_path, kind, environment):
    """Two lives of a run in processes of their own, since such a package keeps state."""
    script = "import pathlib, sys; from tests.training.test_mirrors import live\n"
    script += "live(pathlib.Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])), sys.argv[4])"
    for steps in (("0", "20"), ("20", "40")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run"), *steps, kind],
            env={**os.environ, **environment, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and "the mirror" not in done.stderr, done.stderr
    (name,) = json.loads((tmp_path / "run" / "metrics" / "mirror.json").read_text()).values()
    return name


def test_wandb_offline_keeps_two_lives_under_one_run(tmp_path):
    pytest.importorskip("wandb", reason='wandb is not installed: pip install "snapgen-jax[mirrors]"')
    name = lives_of(tmp_path, "wandb", {"WANDB_MODE": "offline"})
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    assert all(b"train/loss" in file.read_bytes() and b"evaluation/score" in file.read_bytes() for file in files)


def test_trackio_without_a_space_keeps_two_lives_under_one_run(tmp_path):
    pytest.importorskip("trackio", reason='trackio is not installed: pip install "snapgen-jax[mirrors]"')
    name = lives_of(tmp_path, "trackio", {"TRACKIO_DIR": str(tmp_path / "trackio")})
    with sqlite3.connect(tmp_path / "trackio" / "shapes.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics").fetchall()
    assert {run for run, _, _ in rows} == {name}
    losses = [(step, json.loads(line)["train/loss"]) for _, step, line in rows if b"train/loss" in line]
    assert losses == [(10, 5.5), (20, 15.5), (30, 25.5), (40, 35.5)]
