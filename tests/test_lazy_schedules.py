"""`snapgen export` of a run of gates: the schedule that most samples agree with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.cli import main
from snapgen_jax.config import load_config, resolve
from snapgen_jax.experiment import Experiment
from snapgen_jax.lazy_schedules import Calibration, for_bundle
from snapgen_jax.recipes.lazy_gates import masks_of
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from tests.export.conftest import QUICK
from tests.recipes_for_tests import random_like


def saved(config, overrides, workdir):
    """A workdir as training leaves it, with drawn weights."""
    experiment = Experiment(resolve(load_config(config, overrides)), workdir, "cpu")
    experiment.record()
    spec = jax.eval_shape(experiment.recipe.init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec)
    player = state.players["model"]
    params = jax.tree.map(lambda leaf: 0.4 * leaf, random_like(player.params, 1))
    player = dataclasses.replace(player, params=params, ema=player.ema and params)
    checkpointer = Checkpointer(experiment.workdir)
    checkpointer.save(state.replace(players={"model": player}), 0, {})
    checkpointer.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of gates that run about half of the modules, other ones for each example."""
    folder = tmp_path_factory.mktemp("runs")
    base = saved("configs/shapes/lazy_base.py:runlocal", [], folder / "base")
    return saved("configs/shapes/lazy.py:runlocal", [f"base={base}"], folder / "lazy")


def test_agreement_is_that_of_the_decisions_which_the_gates_make():
    ran = np.ones((4, 1, 2, 2), bool)
    ran[:3, 0, 1, 0] = ran[0, 0, 1, 1] = False  # of the second step: three skip the first module, one the other
    found = Calibration.of(ran, np.array([False, True]))
    assert found == Calibration("11,01", 4, agreement=6 / 8, skipped=1 / 4, skipped_by_gates=4 / 16)


def test_the_command_exports_the_schedule_of_most_samples_and_draws_by_it(run, tmp_path, capsys):
    out = tmp_path / "bundle"
    line = ["export", f"--workdir={run}", f"--out={out}", "--precisions=f32", "--gpu=skip", f"--backend={QUICK}"]
    assert main([*line, "--calibration=6"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = json.loads((out / "manifest.json").read_text())["provenance"]["schedule"]
    assert found["examples"] == 6 and 0.5 <= found["agreement"] < 1 and found["skipped"] > 0
    assert report["schedule.agreement"] == found["agreement"]
    masks = masks_of(found["schedule"])
    program = json.loads((out / "program.json").read_text())
    named = {tuple(mask) for mask in masks.tolist()}
    assert len({step.get("unit", "dit") for step in program["steps"]}) == len(named) > 1
    assert main(["sample", f"--bundle={out}", "--prompt=a red circle", f"--out={tmp_path / 'one.png'}"]) == 0


def test_what_leaves_the_gates_nothing_to_say_is_taken_as_it_is(run):
    given = "1111,0110,1111,0000"
    assert for_bundle(run, {"schedule": given}) == ({"schedule": given}, {})
    assert for_bundle(run, {"lazy": 0.0}) == ({"lazy": 0.0}, {})
    assert for_bundle(run, {"lazy": 0.25}, adaptive=True) == ({"lazy": 0.25, "halves": "separate"}, {})
    assert for_bundle(run.parent / "base", {"steps": 3}) == ({"steps": 3}, {})


@pytest.mark.parametrize(
    ("name", "options", "choices", "message"),
    [
        ("base", {}, {"adaptive": True}, "--adaptive is for gates"),
        ("lazy", {"lazy": 0.0}, {"adaptive": True}, "the options leave them nothing"),
        ("lazy", {"lazy": 0.9}, {}, "lazy=0.9: of these 4 steps 2 may skip"),
        ("lazy", {"lazzy": 0.3}, {}, "unknown option 'lazzy'"),
        ("lazy", {}, {"examples": 0}, "--calibration is 0; give 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(run, name, options, choices, message):
    with pytest.raises(ConfigError, match=message):
        for_bundle(run.parent / name, options, **choices)


def test_branches_by_the_other_converter_are_refused_before_anything_is_converted(run, tmp_path, capsys):
    line = ["export", f"--workdir={run}", f"--out={tmp_path / 'bundle'}", "--adaptive", "--backend=litert"]
    assert main(line) == 78
    assert "branches are written by --backend=jax2tf" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
