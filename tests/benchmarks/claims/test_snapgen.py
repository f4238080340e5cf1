"""SnapGen's ladder in the shapes world."""

import dataclasses

from benchmarks.claims.runs import Runs
from benchmarks.claims.snapgen import FIRST_STAGES, LADDER, ladder_costs, ladder_networks, milliseconds, multiply_adds
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


def test_the_first_stages_that_are_compared_differ_in_nothing_else_and_learn_from_the_same(tmp_path):
    runs = Runs(paper("snapgen"), "night", tmp_path / "runs", tmp_path / "out")
    names = {"tf": "ladder G", **{reading: f"first stage {reading}" for reading in FIRST_STAGES}}
    configs = {reading: runs.config(name) for reading, name in names.items()}
    networks = {reading: resolve(config).recipe.network for reading, config in configs.items()}
    assert {r: dataclasses.replace(n, first_stage="tf") for r, n in networks.items()} == dict.fromkeys(
        names, networks["tf"]
    )
    assert [networks[reading].first_stage for reading in names] == ["tf", "res", "res+tf"]
    assert len({configs[reading].train_steps for reading in names}) == 1
    assert runs._alike("ladder G", 0) == runs._alike("first stage res+tf", 0)
    sizes = {reading: parameters(network) for reading, network in networks.items()}
    assert sizes["res+tf"] > max(sizes["tf"], sizes["res"])


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
