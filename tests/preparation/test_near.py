"""Near hashes, found by parts, are those that a comparison of all pairs finds."""

import collections

import numpy as np
import pytest

from snapgen_jax.preparation.near import first_neighbours, parts


def _hashes(count):
    """Random hashes of 64 bits, most of which differ from an earlier one in a few bits."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, 2, 64, np.uint8)]
    while len(rows) < count:
        row = rows[rng.integers(len(rows))].copy() if rng.random() < 0.8 else rng.integers(0, 2, 64, np.uint8)
        row[rng.integers(0, 64, rng.integers(0, 9))] ^= 1
        rows.append(row)
    return [np.packbits(row).tobytes() for row in rows]


def _distance(a, b):
    return (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_parts_lead_every_hash_to_its_first_neighbour(bits):
    hashes = _hashes(200)
    expected = [next((j for j in range(i) if _distance(hashes[i], hashes[j]) <= bits), None) for i in range(200)]
    assert any(expected) and first_neighbours(hashes, bits) == expected
    groups = collections.defaultdict(list)
    for i, near in enumerate(hashes):
        for part in parts(near, bits):
            groups[part].append(i)
    found = [None] * 200
    for members in groups.values():
        for i, first in zip(members, first_neighbours([hashes[i] for i in members], bits), strict=True):
            if first is not None and (found[i] is None or members[first] < found[i]):
                found[i] = members[first]
    assert found == expected
