"""Bits by layer: what is assigned of measured errors."""

import itertools
import math

import numpy as np
import pytest

from snapgen_jax.networks.bit_assignment import assign, average, raised_bits

RANDOM = np.random.default_rng(0)
NAMES = [f"layer_{i:03d}" for i in range(256)]
SIZES = {name: int(n) for name, n in zip(NAMES, RANDOM.integers(1_000, 100_000, 256), strict=True)}
ERRORS = {
    name: {b: float(scale / 4**b) for b in (1, 2, 3)}
    for name, scale in zip(NAMES, np.exp(2 * RANDOM.normal(size=256) + 5), strict=True)
}
DROPS = dict(zip(NAMES, RANDOM.normal(size=256) ** 2, strict=True))


@pytest.mark.parametrize("target", [1.8, 1.99, 2.32, 3.0])
def test_the_average_is_the_one_that_is_wanted(target):
    for drops in (None, DROPS):
        found = assign(ERRORS, SIZES, target, drops=drops)
        assert target - 0.02 < found.average <= target
        assert found.average == average(found.bits, SIZES)
        assert set(found.bits) == set(NAMES)


def test_a_layer_has_the_fewest_bits_whose_sensitivity_is_below_the_threshold():
    found = assign(ERRORS, SIZES, 2.0)
    above = 0
    for name in NAMES:
        scores = {b: ERRORS[name][b] * SIZES[name] ** -0.3 for b in (1, 2, 3)}
        fewest = next((b for b in (1, 2, 3) if scores[b] < found.threshold), 4)
        assert found.bits[name] - fewest in (0, 1)
        above += found.bits[name] - fewest
    assert above < 0.05 * len(NAMES)  # what was left of the target


def test_eta_moves_bits_from_large_layers_to_small_ones():
    even, uneven = (assign(ERRORS, SIZES, 2.0, eta=eta).bits for eta in (0.0, 0.5))
    assert even != uneven
    large = sorted(NAMES, key=SIZES.get)[-64:]
    assert sum(uneven[name] for name in large) < sum(even[name] for name in large)


def test_more_error_means_more_bits_beside_layers_of_the_same_size():
    same = dict.fromkeys(NAMES, 1000)
    found, ordered = assign(ERRORS, same, 2.0), sorted(NAMES, key=lambda name: ERRORS[name][1])
    bits = [found.bits[name] for name in ordered]
    assert sum(b < a for a, b in itertools.pairwise(bits)) <= 2 and bits[0] == 1 and bits[-1] == 4


def test_the_layers_that_prompts_need_are_raised_by_their_rank():
    more = raised_bits(DROPS)
    ordered = sorted(NAMES, key=lambda name: -DROPS[name])
    assert [more.get(name, 0) for name in ordered[:6]] == [3] * 6
    counts = [sum(extra >= n for extra in more.values()) for n in (1, 2, 3)]
    assert counts == [math.ceil(0.10 * 256), math.ceil(0.05 * 256), math.ceil(0.02 * 256)]
    assert raised_bits({name: -drop for name, drop in DROPS.items()}) == {}
    found = assign(ERRORS, SIZES, 2.0, drops=DROPS)
    assert found.raised == more and max(found.bits.values()) > 4


def test_an_average_below_one_bit_everywhere_is_refused():
    with pytest.raises(
        ValueError, match=r"an average of 1.5 bits is less than 1.585, which one bit of each layer takes"
    ):
        assign(ERRORS, SIZES, 1.5)
