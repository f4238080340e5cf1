"""A table of times is fitted to whole networks, and says what others take."""

import pytest

from benchmarks.latency_table import calibrating, milliseconds, random_networks, table_of
from snapgen_jax.derivations.evolution import LatencyTable, described
from snapgen_jax.networks.evolved import kind
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.unet import UNetConfig

NETWORKS = [UNetConfig.preset("smoke", first_stage="res", mid="rar", up_depth=(1, 1)), SDUNetConfig.preset("smoke")]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.kind)
def test_the_table_finds_the_time_of_each_block_and_of_the_rest(network):
    kinds = sorted({kind(network, block) for block in network.droppable_blocks()})
    true = LatencyTable(described(network), {name: 0.5 + i for i, name in enumerate(kinds)}, rest=5.0)
    networks = calibrating(network)
    found = table_of(network, networks, {name: true(one) for name, one in networks.items()})
    assert found.rest == pytest.approx(5.0) and found.blocks == pytest.approx(true.blocks)
    others = random_networks(network, 8, seed=0)
    assert len({*others.values(), network}) == 9
    assert [found(one) for one in others.values()] == pytest.approx([true(one) for one in others.values()])


def test_a_time_is_that_of_all_interpreters_of_a_network(monkeypatch):
    monkeypatch.setattr("benchmarks.latency_table.by_turns", lambda calls, rounds: {n: calls[n]() for n in calls})
    measured = milliseconds({"a": NETWORKS[0]}, lambda _: [lambda: [0.001, 0.009], lambda: [0.002, 0.003, 0.004]], 3)
    assert measured == {"a": pytest.approx(1.8)}
