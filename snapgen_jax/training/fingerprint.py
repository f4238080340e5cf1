"""A number that stands for the exact bits of a tree, computed where the arrays are."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A position-weighted sum of an array's bits modulo 2^32: integer, so no mesh or order of summation changes it."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
    weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)


def _name(path: tuple[Any, ...]) -> str:
    """As `keystr` gives it, a dictionary's key with slashes as several keys."""
    return jax.tree_util.keystr(path).replace("/", "']['")


def fingerprint(tree: Tree) -> str:
    """Hexadecimal digest of the names, shapes, dtypes and bits of a tree of 8- to 32-bit arrays; "" if it is empty.

    A name "a/b" counts as `b` below `a`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    if not leaves:
        return ""
    digest = hashlib.sha256()
    for path, leaf in leaves:
        checksum = int(_checksum(leaf))  # one at a time: on CPU devices, independent programs with collectives deadlock
        digest.update(f"{_name(path)} {leaf.shape} {leaf.dtype} {checksum}\n".encode())
    return digest.hexdigest()[:32]
