"""Random keys. They are made here alone: `key(seed, step, stream)` in training, `example_keys` in generation.

A key is a function of what it is for, so a resumed run stores no generator state, and two streams never share numbers.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp


def key(seed: int | jax.Array, step: int | jax.Array, stream: str) -> jax.Array:
    """The key of one step of one stream.

    Args:
        seed: the run's seed; may be traced.
        step: step number, or example index; may be traced.
        stream: what the key is for ("init", "update" ...). Any name gives an independent stream.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()) & 0x7FFFFFFF), step)


def example_keys(seed: int | jax.Array, indices: jax.Array) -> jax.Array:
    """`[B]` keys, one an example: the two words of a key are (seed, index), those that `diffusion.noise` is drawn from.

    Args:
        seed: from 0 to 2**32 - 1; may be traced.
        indices: `[B]`, within the same bounds; an example's noise does not depend on its batch.
    """
    indices = jnp.asarray(indices).astype(jnp.uint32)
    words = jnp.stack([jnp.full_like(indices, seed), indices], axis=-1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")
