"""Evolution under a budget: what is removed and copied, the table that says what costs what, and the chain of it."""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import pytest

from snapgen_jax.chain import load_chain
from snapgen_jax.chain_run import _Chain
from snapgen_jax.config import load_experiment
from snapgen_jax.derivations import evolution
from snapgen_jax.derivations.evolution import LatencyTable, by_chance, described, multiply_adds, savings, search
from snapgen_jax.evaluation.interfaces import EvaluationResult
from snapgen_jax.generation import Generator
from snapgen_jax.networks.evolved import candidates, kind, kinds, moved_weights
from snapgen_jax.networks.module import build, flatten, frozen_spec
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.block_dropping import RUNS, BlockDropping, BlockDroppingConfig
from snapgen_jax.training.exits import ConfigError
from tests.recipes_for_tests import ONE_STAGE, adder, state_away_from_zero
from tests.students_for_tests import STUDENT

UNET = UNetConfig.preset("smoke", first_stage="res", mid="rar", up_depth=(1, 1))
SD = SDUNetConfig.preset("smoke", down=(("ra",), ("ra", "rar")), mid="rara")
NETWORKS = {"unet": UNET, "sd_unet": SD}
SIZES = (8, 8), 20  # of latents and texts


def synthetic(network):
    """A table in which every kind of block costs another number of milliseconds."""
    times = {name: 1.0 + i for i, name in enumerate(sorted(kinds(network)))}
    return LatencyTable(described(network), [*SIZES[0]], SIZES[1], times, rest=5.0)


def valued(network):
    """Values of blocks in another order than they run."""
    return {block: float((7 * i) % 11) for i, block in enumerate(candidates(network))}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_lowest_values_are_removed_until_the_budget_is_met_and_the_highest_is_copied(name):
    network, table, values = NETWORKS[name], synthetic(NETWORKS[name]), valued(NETWORKS[name])
    budget = 0.75 * table(network)
    made = search(network, values, table, budget, copies=1)
    actions = [step.action for step in made.steps]
    removed = [step.value for step in made.steps if step.action == "remove"]
    assert actions == ["remove"] * (len(actions) - 1) + ["copy"] and len(actions) > 2
    assert removed == sorted(values.values())[: len(removed)]  # the lowest, from the lowest on
    assert made.steps[-1].value == max(values.values())
    assert made.steps[-1].cost == table(made.network) <= budget < table(network)
    less = search(network, values, table, budget, copies=0)
    assert len(less.steps) < len(actions) and {step.action for step in less.steps} == {"remove"}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_removed_is_the_block_that_was_meant_whatever_it_is_called_by_then(name):
    network, table, values = NETWORKS[name], synthetic(NETWORKS[name]), valued(NETWORKS[name])
    made = search(network, values, table, 0.6 * table(network), copies=0)
    lowest = sorted(values, key=lambda block: values[block])[: len(made.steps)]
    saved = savings(network, table)
    assert table(network) - table(made.network) == pytest.approx(sum(saved[block] for block in lowest))
    costs = [table(network), *(step.cost for step in made.steps)]
    assert [a - b for a, b in itertools.pairwise(costs)] == pytest.approx([saved[b] for b in lowest])


def test_a_budget_below_what_blocks_can_save_is_refused():
    table = synthetic(UNET)
    with pytest.raises(ConfigError, match=r"budget=4: without down_.* the network costs 5 still; raise the budget"):
        search(UNET, valued(UNET), table, 4.0, copies=1)


def test_where_a_copy_finds_no_room_nothing_is_removed_for_it():
    """The best block costs more than all else that could go, or is all that is left."""
    table, values = synthetic(UNET), valued(UNET)
    best = max(values, key=lambda block: values[block])
    dear = dataclasses.replace(table, blocks={**table.blocks, kind(UNET, best): 100.0})
    budget = dear(UNET) - 1.0
    made = search(UNET, values, dear, budget, copies=1)
    assert made == search(UNET, values, dear, budget, copies=0)
    assert [step.action for step in made.steps] == ["remove"]
    last = search(UNET, {best: 1.0}, table, table(UNET) - 1.0, copies=1)
    assert [(step.action, step.block) for step in last.steps] == [("remove", best)]


def test_chance_meets_the_budget_too_and_differs_by_its_seed():
    table = synthetic(UNET)
    made = [by_chance(UNET, table, 0.7 * table(UNET), 1, seed) for seed in range(4)]
    assert all(table(one.network) <= 0.7 * table(UNET) for one in made)
    assert len({one.network for one in made}) > 1
    assert by_chance(UNET, table, 0.7 * table(UNET), 1, 2) == made[2]


def test_multiply_adds_stand_for_times_where_there_is_no_table():
    cost = multiply_adds((8, 8), 6)
    saved = savings(UNET, cost)
    assert cost(UNET) > sum(saved.values()) > 0 and min(saved.values()) > 0


def test_a_table_is_read_for_its_own_network_and_refused_for_another(tmp_path):
    table = synthetic(UNET)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(dataclasses.asdict(table)))
    evolved = dataclasses.replace(UNET, blocks=(("mid_transformer", 2),), dtype="float32")
    read = LatencyTable.read(str(path), evolved, *SIZES)
    assert read(evolved) == table(UNET) + table.blocks["mid_transformer"]
    with pytest.raises(ConfigError, match=r"another network; these fields differ: groups=4 \(network: 8\)"):
        LatencyTable.read(str(path), dataclasses.replace(UNET, groups=8), *SIZES)
    path.write_text(json.dumps({**dataclasses.asdict(table), "blocks": {"mid_residual_block": 1.0}}))
    with pytest.raises(ConfigError, match=r"has no time of .*mid_transformer"):
        LatencyTable.read(str(path), UNET, *SIZES)
    path.write_text(json.dumps(dataclasses.asdict(table)))
    with pytest.raises(
        ConfigError, match=r"of latents \[8, 8\] and texts of 20 tokens, and the run has \[16, 16\] and 20"
    ):
        LatencyTable.read(str(path), UNET, (16, 16), 20)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"no table of latencies: .*; make it with `python -m"):
        LatencyTable.read(str(path), UNET, *SIZES)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ({"mid_transformer": 0.0}, r"has the times \{'mid_transformer': 0\.0\}, .* more than 0"),
        ({"mid_transformer": -1.0}, r"\{'mid_transformer': -1\.0\}"),
        ({"mid_transformer": float("nan")}, r"\{'mid_transformer': nan\}"),
        ({"rest": -0.5}, r"\{'rest': -0\.5\}"),
    ],
)
def test_times_that_are_none_are_refused_before_a_block_is_valued(times, says, tmp_path):
    table = dataclasses.asdict(synthetic(UNET))
    rest = times.pop("rest", 0.0)  # may be 0
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**table, "blocks": {**table["blocks"], **times}, "rest": rest}))
    with pytest.raises(ConfigError, match=says):
        LatencyTable.read(str(path), UNET, *SIZES)


@pytest.mark.parametrize("form", ["", ":quick", ":runlocal"])
def test_the_chain_reads_and_its_configs_fit_what_will_be_derived(form, tmp_path):
    chain, overrides = load_chain(f"configs/shapes/evolve.py{form}")
    configs = _Chain(chain, overrides, tmp_path).configs
    assert [stage.name for stage in chain.stages] == [
        "robust",
        "evolve_1",
        "evolved_1",
        "evolve_2",
        "evolved_2",
        "eight",
        "released",
    ]
    for name in ("evolved_1", "evolved_2", "eight"):
        assert configs[name].recipe.network.blocks == (("mid_transformer", 2),)
    assert configs["eight"].recipe.teacher.network == configs["eight"].recipe.network


@pytest.mark.parametrize("form", ["quick", "runlocal"])
def test_both_rounds_of_the_chain_find_room_whatever_blocks_are_worth(form):
    """Values by chance stand for those of training."""
    first, _, second, *_ = load_chain(f"configs/shapes/evolve.py:{form}")[0].stages[1:]
    recipe: Any = load_experiment(f"configs/shapes/robust.py:{form}").start("cpu")
    network = recipe.denoiser.network.config
    file = first.options["table"]
    cost = LatencyTable.read(file, network, *SIZES) if file else multiply_adds(recipe.inputs.latent_shape()[:2], 20)
    for seed in range(8 if file else 2):
        found = network
        for stage in (first, second):
            budget = stage.options["budget"] * cost(network)
            made = by_chance(found, cost, budget, stage.options["copies"], seed)
            assert cost(made.network) <= budget
            found = made.network


def test_the_stored_table_orders_networks_as_they_are_measured():
    stored = json.loads(pathlib.Path(load_chain("configs/shapes/evolve.py")[0].stages[1].options["table"]).read_text())
    assert stored["spearman"] >= 0.9 and len(stored["whole networks, by the table and measured"]) >= 10
    assert min(stored["blocks"].values()) > 0


@pytest.mark.parametrize(
    ("file", "times"),
    [
        ("steps.py", [999, 937, 874, 811]),
        ("steps.py:runlocal", [999, 749, 499, 249]),
        ("robust.py:evolved", []),
        ("robust.py:runlocal", []),
    ],
)
def test_the_configs_of_stable_diffusion_hold_its_blocks_and_native_steps(file, times):
    recipe: Any = load_experiment(f"configs/snapfusion/{file}").start("cpu")
    if times:
        assert recipe.grid.time[:4].tolist() == times and recipe.teacher.config.prediction == "v"
    else:
        assert recipe.blocks == recipe.config.network.droppable_blocks() and recipe.drops


def test_the_published_evolved_unet_begins_as_blocks_of_the_whole_one_all_of_them():
    recipe: Any = load_experiment("configs/snapfusion/robust.py:evolved").start("cpu")
    networks = SDUNetConfig.preset("sd15"), recipe.config.network
    whole, evolved = (frozen_spec(build(network)[0]) for network in networks)
    moved = moved_weights(evolved, whole, recipe.config.moved)
    assert {path: leaf.shape for path, leaf in flatten(moved).items()} == {
        path: leaf.shape for path, leaf in flatten(evolved).items()
    }


WORTH = {
    "down_0_0_residual_block": 0.3,
    "mid_residual_block": 0.01,
    "mid_transformer": 0.5,
}  # what is lost without each


@pytest.mark.parametrize("metric", ["score", "loss"])
def test_a_round_measures_each_block_once_and_records_every_value_and_action(metric, tmp_path, monkeypatch):
    network = UNetConfig.preset("smoke", latent_channels=12, **ONE_STAGE)
    recipe = BlockDropping(BlockDroppingConfig(**{**STUDENT, "network": network}), "cpu")
    assert recipe.blocks == tuple(WORTH)
    generator = Generator(recipe, {"model": state_away_from_zero(recipe).players["model"].params}, {}, None)
    asked = []

    def measure(run, names, *, options=None, generator):
        asked.append(names)
        if names == ("validation_loss",):
            return EvaluationResult({f"validation_loss.without.{b}": worth for b, worth in WORTH.items()}, {}, {})
        assert options == {"compositional": {"per_category": 2, "categories": ["single_object"]}}
        lost = sum(w for w, runs in zip(WORTH.values(), generator.params[RUNS], strict=True) if not runs)
        return EvaluationResult({"score.overall": 0.9 - lost}, {}, {})

    monkeypatch.setattr(evolution, "load", lambda run: generator)
    monkeypatch.setattr(evolution, "measure", measure)
    options = {"budget": 0.99, "copies": 0, "table": "", "metric": metric}
    options |= {"per_category": 2, "categories": ["single_object"]}
    made = evolution.evolve({"from": tmp_path}, tmp_path / "round", options)
    assert len(asked) == (1 if metric == "loss" else 1 + len(WORTH))
    assert made["actions"] == ["remove mid_residual_block"] and made["network"] == {
        "blocks": [["mid_residual_block", 0]]
    }
    assert made["cost"] <= made["budget"] and made["moved"] == []
    items = {one["name"]: one["value"] for one in map(json.loads, (tmp_path / "round/items.jsonl").open())}
    for block, worth in WORTH.items():
        value = items[f"value of {block}"]
        assert value["lost"] == pytest.approx(worth) and value["value"] == pytest.approx(worth / value["saved"])
    assert items["action 1: remove mid_residual_block"]["cost"] == made["cost"]
    assert evolution.evolve({"from": tmp_path}, tmp_path / "round", options) == made
    assert len(asked) == (1 if metric == "loss" else 1 + len(WORTH))  # what is on record is not measured again
    chance = evolution.random_architecture({"from": tmp_path}, tmp_path / "chance", {**options, "seed": 0})
    assert chance["cost"] <= made["budget"] and len(chance["actions"]) >= 1


def test_a_run_whose_blocks_cannot_be_missed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evolution, "load", lambda run: adder(1, 2))
    with pytest.raises(ConfigError, match=r"no run of the recipe 'block_dropping'"):
        evolution.evolve({"from": tmp_path}, tmp_path / "round", {})
