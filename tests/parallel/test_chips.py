"""Peaks, and what follows from them."""

import dataclasses

import pytest

from snapgen_jax.parallel.chips import CHIPS, Chip, Roofline, chip_of, chip_of_kind

CHIP = Chip("made up", 100e12, 10e9, 1e12, 100e9, 2, ("Made Up",), "https://example.org")


def test_every_chip_states_its_source():
    for chip in CHIPS.values():
        assert "https://" in chip.source
        assert chip_of(chip.name) is chip
        assert all(chip_of_kind(kind) is chip for kind in chip.kinds)


def test_an_unknown_chip_is_refused_and_an_unknown_device_has_no_peaks():
    with pytest.raises(ValueError, match="unknown chip 'v7'; known: v4, v5e"):
        chip_of("v7")
    assert chip_of_kind("cpu") is None


@pytest.mark.parametrize(
    ("needs", "bound", "seconds"),
    [((50e12, 1e9, 0), "compute", 1.0), ((1e12, 1e12, 0), "hbm", 2.0), ((1e12, 1e9, 300e9), "links", 3.0)],
)
def test_the_tightest_resource_of_half_a_chip_decides(needs, bound, seconds):
    roofline = Roofline(CHIP, *needs)
    assert roofline.bound == bound
    assert roofline.seconds == pytest.approx(seconds)


def test_what_leaves_a_slice_takes_the_time_of_the_network():
    known = dataclasses.replace(CHIP, network_bandwidth=1e9)
    assert Roofline(known, 1e12, 1e9, network_bytes=4e9).bound == "network"
    assert Roofline(known, 1e12, 1e9).times.keys() == {"compute", "hbm", "links"}
    with pytest.raises(ValueError, match="no bandwidth between slices of made up is published; plan one slice"):
        Roofline(CHIP, 1e12, 1e9, network_bytes=4e9).times  # noqa: B018


def test_what_is_int8_takes_the_time_of_int8():
    fast = dataclasses.replace(CHIP, int8_flops=200e12)
    assert Roofline(fast, 50e12, 0, int8_flops=40e12).times["compute"] == pytest.approx(2 * (0.1 + 0.2))
    assert CHIP.int8_flops == CHIP.flops, "a maker that states no rate"
    twice = {name for name, chip in CHIPS.items() if chip.int8_flops / chip.flops == pytest.approx(2, rel=0.01)}
    assert twice == {"v5e", "v5p", "v6e"}
