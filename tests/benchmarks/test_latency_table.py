"""A table of times is fitted to whole networks, and says what others take."""

import json

import pytest

from benchmarks.latency_table import calibrating, form_of, measured_recipe, milliseconds, random_networks, table_of
from snapgen_jax.config import load_experiment
from snapgen_jax.derivations.evolution import LatencyTable, described
from snapgen_jax.networks.evolved import kinds
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.training.exits import ConfigError

NETWORKS = [UNetConfig.preset("smoke", first_stage="res", mid="rar", up_depth=(1, 1)), SDUNetConfig.preset("smoke")]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.kind)
def test_the_table_finds_the_time_of_each_block_and_of_the_rest(network):
    true = LatencyTable(
        described(network), [8, 8], 20, {name: 0.5 + i for i, name in enumerate(sorted(kinds(network)))}, rest=5.0
    )
    networks = calibrating(network)
    found = table_of(network, networks, {name: true(one) for name, one in networks.items()}, (8, 8), 20)
    assert found.rest == pytest.approx(5.0) and found.blocks == pytest.approx(true.blocks)
    others = random_networks(network, 8, seed=0)
    assert len({*others.values(), network}) == 9
    assert [found(one) for one in others.values()] == pytest.approx([true(one) for one in others.values()])


def test_a_time_is_that_of_all_interpreters_of_a_network(monkeypatch):
    monkeypatch.setattr("benchmarks.latency_table.by_turns", lambda calls, rounds: {n: calls[n]() for n in calls})
    measured = milliseconds({"a": NETWORKS[0]}, lambda _: [lambda: [0.001, 0.009], lambda: [0.002, 0.003, 0.004]], 3)
    assert measured == {"a": pytest.approx(1.8)}


def test_a_block_whose_time_is_lost_in_the_noise_makes_no_table():
    network = NETWORKS[0]
    networks = calibrating(network)
    with pytest.raises(SystemExit, match=r"of .*mid_transformer.* do not stand out from the noise; give more --rounds"):
        table_of(network, networks, dict.fromkeys(networks, 1.0), (8, 8), 20)


@pytest.mark.parametrize(
    ("config", "latent", "tokens", "block"),
    [
        ("shapes/robust.py:quick", (8, 8), 20, "mid_transformer"),
        ("snapfusion/robust.py", (64, 64), 77, "down_1_a"),
    ],
)
def test_the_form_of_a_table_names_blocks_and_sizes_of_a_config_and_is_no_table(
    config, latent, tokens, block, tmp_path
):
    network, shape, context = measured_recipe(load_experiment(f"configs/{config}").start("cpu"))
    form = form_of(network, shape[:2], context.sequence.shape[1])
    assert (form["latent"], form["tokens"]) == ([*latent], tokens) and form["blocks"][block] is None
    path = tmp_path / "form.json"
    path.write_text(json.dumps(form))
    with pytest.raises(ConfigError, match="is no table of latencies"):
        LatencyTable.read(str(path), network, latent, tokens)
    path.write_text(json.dumps({**form, "blocks": dict.fromkeys(form["blocks"], 1.5), "rest": 0}))
    assert LatencyTable.read(str(path), network, latent, tokens)(network) == 1.5 * len(network.droppable_blocks())
