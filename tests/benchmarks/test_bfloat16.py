"""What bfloat16 does to a velocity is measured against the same weights in float32."""

import json
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import bfloat16
from benchmarks.bfloat16 import Points, as_drawn, away_from_zero, compare
from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.module import build, for_platform, init
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import VALIDATION_TIMES
from snapgen_jax.systems.denoiser import Denoiser
from tests.networks.tiny import inputs
from tests.recipes_for_tests import ONE_STAGE

STORED = pathlib.Path(bfloat16.__file__).parent / "results" / "bfloat16-cpu2.jsonl"
CONFIG = for_platform(UNetConfig.preset("smoke", **ONE_STAGE), "cpu")


@pytest.fixture(scope="module")
def measured():
    network, _ = build(CONFIG)
    params = away_from_zero(init(network, jax.random.key(0)), jax.random.key(1))
    x, _, context = inputs(CONFIG)
    point = Points(x, x[::-1], context)
    return {dtype: compare(Denoiser(network), params, [point], dtype) for dtype in ("float32", "bfloat16")}


def test_equal_computation_is_no_error(measured):
    assert all(row["error"] == row["floor"] == 0 < row["velocity"] for row in measured["float32"].values())


def test_bfloat16_is_an_error_of_some_of_its_roundings(measured):
    """One rounding to 8 bits is off by at most 2^-9 of the number, and by about a third of that on average."""
    rows = measured["bfloat16"]
    assert list(rows) == [*(f"t={t:.2f}" for t in VALIDATION_TIMES), "all"]
    for row in rows.values():
        assert 2**-9 / 3 < row["error"] < 32 * 2**-9
        assert row["floor"] == pytest.approx(row["error"] ** 2 * row["velocity"])
    for name in ("velocity", "floor"):
        assert rows["all"][name] == pytest.approx(np.mean([rows[t][name] for t in rows if t != "all"]))


def test_the_stored_numbers_are_of_the_networks_of_today():
    lines = [json.loads(line) for line in STORED.read_text().splitlines()]
    counts = {line["network"]: line["parameters"] for line in lines if line["weights"] == "drawn"}
    assert counts == {name: parameters(make()) for name, make in bfloat16.DRAWN.items()}
    for line in lines:
        assert line["machine"]
        for row in line["times"].values():
            assert row["floor"] == pytest.approx(row["error"] ** 2 * row["velocity"])


def test_a_network_as_it_is_drawn_is_measured_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bfloat16, "DRAWN", {"tiny": lambda: UNetConfig.preset("smoke", **ONE_STAGE)})
    bfloat16.main([f"--out={tmp_path / 'kept.jsonl'}"])
    (line,) = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert line == capsys.readouterr().out.strip()
    assert json.loads(line)["times"] == as_drawn(UNetConfig.preset("smoke", **ONE_STAGE))
