"""SnapGen's ladder in the shapes world."""

import dataclasses

from benchmarks.claims.runs import Runs
from benchmarks.claims.snapgen import LADDER, ladder_costs, ladder_networks, milliseconds, multiply_adds
from benchmarks.claims.trials import paper
from snapgen_jax.config import resolve
from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.unet import UNetConfig


def test_the_ladder_of_the_shapes_world_has_eight_networks_and_ends_smaller_than_it_began(tmp_path):
    networks = ladder_networks("patches")
    assert len(set(networks.values())) == 8
    runs = Runs(paper("snapgen"), "night", tmp_path / "runs", tmp_path / "out")
    trained = {step: resolve(runs.config(f"ladder {step}")).recipe.network for step in networks}
    assert trained == {step: dataclasses.replace(network, dtype="float32") for step, network in networks.items()}
    assert parameters(networks["G"]) < parameters(networks["A"])
    assert multiply_adds(networks["G"]) < multiply_adds(networks["A"])


def test_networks_are_timed_side_by_side(quick_to_compile):
    layout = {"down_depth": (0,), "mid_depth": 0, "up_depth": (0,), "convolution": "ordinary", "first_stage": "res"}
    layout |= {"self_attention": (False,), "cross_attention": (False,)}
    networks = {str(width): UNetConfig.preset("smoke", channels=(width,), **layout) for width in (8, 16)}
    times = milliseconds(networks, rounds=1, batch=1)
    assert set(times) == {"8", "16"} and all(ms > 0 for ms in times.values())


def test_the_costs_of_the_ladder_are_given_for_each_of_its_rows(monkeypatch):
    networks = {row.removeprefix("ladder "): UNetConfig.preset("smoke") for row in LADDER}
    monkeypatch.setattr("benchmarks.claims.snapgen.ladder_networks", lambda arg: networks)
    monkeypatch.setattr("benchmarks.claims.snapgen.milliseconds", lambda configs: dict.fromkeys(configs, 2.5))
    costs = {"multiply_adds": multiply_adds(networks["G"]), "milliseconds": 2.5}
    assert ladder_costs("runlocal", {}) == dict.fromkeys(LADDER, costs)
