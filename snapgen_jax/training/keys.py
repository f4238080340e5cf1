"""Random keys. `key(seed, step, stream)` is the only place where a key is made.

A key is a function of what it is for, so a resumed run stores no generator state, and two streams never share numbers.
"""

from __future__ import annotations

import zlib

import jax


def key(seed: int | jax.Array, step: int | jax.Array, stream: str) -> jax.Array:
    """The key of one step of one stream.

    Args:
        seed: the run's seed; may be traced.
        step: step number, or example index; may be traced.
        stream: what the key is for ("init", "update", "generate" ...). Any name gives an independent stream.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()) & 0x7FFFFFFF), step)


def example_keys(seed: int | jax.Array, indices: jax.Array, stream: str) -> jax.Array:
    """`[B]` keys, one an example, from (seed, index): an example's noise does not depend on its batch."""
    return jax.vmap(lambda index: key(seed, index, stream))(indices)
