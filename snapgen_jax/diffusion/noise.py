"""Noise from a seed: the same numbers in JAX, in NumPy, and in any other language that follows this page.

A number of the noise is made of 32 random bits, those of its example and its place. The example is the pair (seed,
index), both whole numbers from 0 to 2**32 - 1; the place i = 0, 1, 2 ... counts the elements of the whole noise array
of one example in C order (the last axis runs fastest).

    bits    the first word of Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
            2, 3"; `threefry2x32` below) of the counter (0x6E6F6973, i) under the key (seed, index). The constant keeps
            this noise apart from what else is drawn under the same key
    u       (2 k + 1 - 2**24) / 2**24 with k = bits >> 8: of 2**24 values in the open interval (-1, 1), all exact in
            float32, and never 0
    normal  sqrt(2) erfinv(u), in float32, with Giles' polynomials for erfinv (2011, "Approximating the erfinv
            function", GPU Computing Gems), whose coefficients are multiplied by sqrt(2): see `normal` below. From
            -5.42 to 5.42

The bits are equal everywhere. The normals are equal to 1e-6, whatever the last bit of a platform's log and sqrt, and
as close to the true inverse. `docs/noise.md` of snapgen_jax has numbers to check a port against, and so has a bundle:
golden/noise.npy is the noise of the seed in golden.json and of the indices 0, 1 ...

This file is copied into every export bundle, and imports NumPy alone; `xp` is `numpy`, or `jax.numpy` in its place.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

PLACE = 0x6E6F6973  # "nois"
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Of erfinv(u) / u, highest power first: in w - 2.5 where w = -log((1 - u) (1 + u)) is below 5, else in sqrt(w) - 3.
CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """The two words that a key makes of a counter, in 20 rounds, as Random123 does.

    Args:
        key, counter: two uint32 arrays each, whose shapes broadcast; a counter is no scalar.
    """
    keys = (*key, key[0] ^ key[1] ^ np.uint32(PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for four in range(5):
        for rotation in ROTATIONS[four % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation)))
        x = x + keys[(four + 1) % 3]
        y = y + keys[(four + 2) % 3] + np.uint32(four + 1)
    return x, y


def normal(bits: Any, xp: Any = np) -> Any:
    """Standard normal float32 of uint32 bits, elementwise; 0 gives the smallest, and 2**32 - 1 the largest."""
    odd = 2 * (bits >> np.uint32(8)).astype(xp.int32) + (1 - 2**24)
    u = odd.astype(xp.float32) * 2.0**-24
    w = -xp.log((1 - u) * (1 + u))
    return u * xp.where(w < 5, _polynomial(CENTRE, w - 2.5), _polynomial(TAIL, xp.sqrt(w) - 3))


def _polynomial(coefficients: Sequence[float], w: Any) -> Any:
    """sqrt(2) times a polynomial, by Horner's rule; the factor is put into the coefficients, for one rounding less."""
    value, *others = (math.sqrt(2) * coefficient for coefficient in coefficients)
    for coefficient in others:
        value = value * w + coefficient
    return value


def standard_normal(seeds: Any, indices: Any, shape: Sequence[int], xp: Any = np) -> Any:
    """Noise float32 `[B, *shape]` of the examples (seeds[b], indices[b]), both uint32 `[B]`."""
    places = xp.arange(math.prod(shape), dtype=xp.uint32).reshape(1, *shape)
    seeds, indices = (words.reshape(-1, *(1 for _ in shape)) for words in (seeds, indices))
    bits, _ = threefry2x32((seeds, indices), (xp.full_like(places, PLACE), places))
    return normal(bits, xp)


def draw_noise(seed: int, index: int, shape: Sequence[int]) -> np.ndarray:
    """Noise float32 `shape` of one example, in NumPy.

    Raises:
        ValueError: see `word`.
    """
    seeds, indices = np.array([word("seed", seed)]), np.array([word("index", index)])
    return standard_normal(seeds, indices, shape)[0]


def word(name: str, value: Any) -> np.uint32:
    """A seed or an index as a word of the key. Raises `ValueError` unless it is a whole number of 32 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise ValueError(f"the {name} is {value}; it must be a whole number from 0 to {2**32 - 1}")
    return np.uint32(number)
