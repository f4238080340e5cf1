"""How many bytes weights of few levels take: by shapes and bits, and in the stored files."""

import json
import math

import pytest

from benchmarks import packing

STORED = {line["network"]: line for line in json.loads((packing.RESULTS / "packing-cpu2.json").read_text())}
PAPER = 219e6  # bytes, BitsFusion (Sui et al. 2024, table 1), of 1.99 bits


@pytest.fixture(scope="module", params=["shapes", "sd15"])
def network(request):
    return request.param, *packing.networks()[request.param]()


def test_the_stored_sizes_follow_from_shapes_and_bits(network):
    name, config, bits = network
    found, stored = packing.by_formula(config, bits), STORED[name]
    assert (found.total, found.weights, found.scales, found.others) == tuple(
        stored["formula"][part] for part in ("bytes", "weights", "scales", "others")
    )
    assert stored["paper"] == packing.papers_count(config, bits)
    assert (len(bits), found.count) == (stored["layers"], stored["weights"])


def test_files_are_within_three_percent_of_the_formula():
    assert STORED.keys() == packing.networks().keys()
    for stored in STORED.values():
        assert 0 < stored["file"]["over_formula"] < 0.03
        size, by_formula = stored["file"]["bytes"], stored["formula"]["bytes"]
        assert size / by_formula - 1 == pytest.approx(stored["file"]["over_formula"], abs=1e-5)
        assert stored["float16_bytes"] / size == pytest.approx(stored["file"]["float16_ratio"], abs=1e-3)
        assert stored["formula"]["weights"] < min(stored["entropy"].values())  # zlib of int8 is larger


def test_stable_diffusion_is_219_megabytes_by_the_papers_count_and_on_disk():
    stored = STORED["sd15"]
    assert stored["paper"]["average_bits"] == pytest.approx(1.99, abs=0.005)
    assert stored["paper"]["bytes"] == pytest.approx(PAPER, rel=0.01)
    assert stored["file"]["bytes"] == pytest.approx(PAPER, rel=0.01) and stored["file"]["float16_ratio"] > 7.8
    assert stored["formula"]["bits_a_weight"] == pytest.approx(2.04, abs=0.005)  # of what is stored alone
    assert STORED["t2i"]["formula"]["bits_a_weight"] == pytest.approx(2.0, abs=0.02)


def test_unpacking_takes_a_few_megabytes_and_no_jax():
    """Python with numpy takes some 30 MB; the unpacked file of Stable Diffusion has 831."""
    for stored in STORED.values():
        assert stored["unpack"]["peak_bytes"] < 80e6 and stored["machine"] and stored["commit"]
    assert STORED["sd15"]["weights"] == sum(STORED["sd15"]["weights_by_bits"].values()) > 831e6
    assert math.isclose(sum(STORED["sd15"]["weights_by_bits"][b] for b in "123") / 831.2e6, 0.96, abs_tol=0.01)
