"""Integers of few levels as digits, several of them in one number of up to 57 bits. Copied into every bundle.

A weight of b bits takes 2^b + 1 values, so a field of its own would need b + 1 bits: 2 in place of the 1.585 that three
values are worth. Digits are therefore put together: n digits d_i of radix r become the one number sum d_i r^i, of
k = ceil(n log2 r) bits, and the numbers follow each other bit by bit.

| bits | levels r | digits n | in k bits | bits a weight | log2 r |
|---|---|---|---|---|---|
| 1 | 3 | 29 | 46 | 1.586 | 1.585 |
| 2 | 5 | 3 | 7 | 2.333 | 2.322 |
| 3 | 9 | 17 | 54 | 3.176 | 3.170 |
| 4 | 17 | 11 | 45 | 4.091 | 4.087 |
| 5 | 33 | 11 | 56 | 5.091 | 5.044 |
| 6 | 65 | 9 | 55 | 6.111 | 6.022 |
| 7 | 129 | 8 | 57 | 7.125 | 7.011 |
| 8 | 255 | 1 | 8 | 8 | 7.994 |
"""

from __future__ import annotations

import functools
import pathlib
import sys

import numpy as np

if __package__:
    from snapgen_jax.export.program import BundleError
else:  # beside its own copy, in a bundle
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent))
    from program import BundleError  # type: ignore[import-not-found]

MOST_BITS = 8
WORD_BITS = 57  # the widest group: with any offset of 0 to 7 bits it lies in one word of 64
BLOCK = 2048  # times 8 groups that are worked on at a time


class PackedError(BundleError):
    """This is no packed file, or it is damaged, or of a newer format, or cannot be written. Says which."""


def levels(bits: int) -> int:
    """How many values a weight of b bits takes: 2^b + 1, symmetric about 0 (Sui et al. 2024, "BitsFusion", section
    3.2); of 8 bits 255, what int8 holds symmetrically.

    Raises:
        PackedError: there is no such number of bits; 1 to 8 are.
    """
    if type(bits) is not int or not 1 <= bits <= MOST_BITS:
        raise PackedError(f"weights have 1 to {MOST_BITS} bits, as a whole number; got {bits!r}")
    return 255 if bits == MOST_BITS else 2**bits + 1


@functools.cache
def group(bits: int) -> tuple[int, int]:
    """(n, k): n digits of radix `levels(bits)` are stored as one number of k bits.

    k = ceil(n log2(levels)); of all n with k <= 57 the one with the least k / n, and of equal ones the smallest.
    """
    radix = levels(bits)
    fits = [(n, k) for n in range(1, WORD_BITS + 1) if (k := (radix**n - 1).bit_length()) <= WORD_BITS]
    return min(fits, key=lambda pair: (pair[1] / pair[0], pair[0]))


def stored_bytes(count: int, bits: int) -> int:
    """The bytes that `count` integers take: ceil(ceil(count / n) k / 8)."""
    n, k = group(bits)
    return -(-(-(-count // n) * k) // 8)


def decode(data: bytes, bits: int) -> np.ndarray:
    """The integers, int8, of whole groups: as many as `data` has room for.

    Raises:
        PackedError: a group is above what its digits can be.
    """
    (n, k), radix = group(bits), np.uint64(levels(bits))
    blocks = max(1, -(-len(data) // k))  # of 8 groups, which are k bytes
    padded = data + bytes(blocks * k - len(data) + 8)
    words = np.empty((blocks, 8), np.uint64)
    for j in range(8):
        start, shift = divmod(j * k, 8)
        loaded = np.ndarray((blocks,), "<u8", padded, start, (k,))  # overlapping words, which are only read
        words[:, j] = (loaded >> np.uint64(shift)) & np.uint64(2**k - 1)
    rest = words.reshape(-1)[: 8 * len(data) // k]
    out = np.empty((rest.size, n), np.int8)
    for i in range(n):
        less = rest // radix
        out[:, i] = (rest - less * radix).astype(np.int16) - levels(bits) // 2
        rest = less
    if rest.any():
        raise PackedError(f"the packed weights are damaged: a group is larger than {n} digits of radix {radix}")
    return out.reshape(-1)


def encode(integers: np.ndarray, bits: int) -> bytes:
    """The digits of integers, of any shape and integer dtype, in C order.

    Raises:
        PackedError: an integer is not among the levels of its bits.
    """
    (n, k), radix, half = group(bits), levels(bits), levels(bits) // 2
    flat = np.ascontiguousarray(integers).reshape(-1)
    if flat.size and (flat.min() < -half or flat.max() > half):
        raise PackedError(f"integers of {bits} bits lie in -{half}..{half}; got {flat.min()}..{flat.max()}")
    step = 8 * BLOCK * n
    made = b"".join(_encoded(flat[place : place + step], n, k, radix) for place in range(0, flat.size, step))
    return made[: stored_bytes(flat.size, bits)]


def _encoded(flat: np.ndarray, n: int, k: int, radix: int) -> bytes:
    """Some digits, in whole bytes of eight groups each."""
    blocks = -(-flat.size // (8 * n))
    digits = np.zeros(blocks * 8 * n, np.uint64)
    digits[: flat.size] = flat.astype(np.int64) + radix // 2
    words = np.zeros(blocks * 8, np.uint64)
    for i in reversed(range(n)):
        words = words * np.uint64(radix) + digits[i::n]
    out = np.zeros((blocks, k), np.uint8)
    for j, word in enumerate(words.reshape(blocks, 8).T):
        start, shift = divmod(j * k, 8)
        shifted = word << np.uint64(shift)
        for i in range((shift + k + 7) // 8):
            out[:, start + i] |= (shifted >> np.uint64(8 * i)).astype(np.uint8)
    return out.tobytes()
