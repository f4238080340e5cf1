"""Which perceptual hashes lie near each other, without comparing each with each.

Two hashes that differ in at most `b` bits agree in at least one of any `b + 1` parts of them, so that only those that
share a part are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def parts(near: bytes, bits: int) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each of the `bits + 1` parts of a hash; hashes within `bits` bits share one of them."""
    flat = np.unpackbits(np.frombuffer(near, np.uint8))
    for number, part in enumerate(np.array_split(flat, bits + 1)):
        yield number, np.packbits(part).tobytes()


def first_neighbours(hashes: Sequence[bytes], bits: int) -> list[int | None]:
    """For each hash the index of the first before it that differs in at most `bits` bits; None where there is none."""
    first: dict[bytes, int] = {}
    for index, near in enumerate(hashes):
        first.setdefault(near, index)
    at = np.fromiter(first.values(), np.int64)
    rows = np.frombuffer(b"".join(first), np.uint8).reshape(len(first), -1)
    neighbours: dict[bytes, int] = {}
    for i, near in enumerate(first):
        close = np.bitwise_count(rows[:i] ^ rows[i]).sum(axis=1) <= bits
        if close.any():
            neighbours[near] = int(at[close.argmax()])
    return [neighbours.get(near, first[near] if first[near] < i else None) for i, near in enumerate(hashes)]
