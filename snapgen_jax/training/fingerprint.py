"""A number that stands for the exact bits of a tree, computed where the arrays are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
_SMALL = 2**16  # elements
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A position-weighted sum of an array's bits modulo 2^32: integer, so no mesh or order of summation changes it."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
    weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)


def _mixed_checksum(x: jax.Array) -> int:
    """A sum modulo 2^32 of an array's bits, each element mixed with its position by a bijection: whatever happens to
    one element alone changes it. (Elements of 64 bits count as pairs.)"""
    if x.size <= _SMALL and getattr(x, "is_fully_addressable", True):  # not worth a program of its own
        host = np.ascontiguousarray(x)
        unsigned = np.dtype(f"u{min(4, host.dtype.itemsize)}")
        return int(_mixed(host.reshape(-1).view(unsigned), np).sum(dtype=np.uint32))
    return int(_mixed_checksum_on_device(x))


@jax.jit
def _mixed_checksum_on_device(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[min(4, x.dtype.itemsize)]).reshape(-1)
    return jnp.sum(_mixed(bits, jnp), dtype=jnp.uint32)


def _mixed(bits: Any, np_or_jnp: Any) -> Any:
    """Unsigned integers mixed with their positions by the finalizer of MurmurHash3, a bijection."""
    uint32 = np_or_jnp.uint32
    mixed = bits.astype(uint32) ^ (np_or_jnp.arange(bits.size, dtype=uint32) * uint32(2654435761))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> uint32(shift))) * uint32(factor)
    return mixed


def _name(path: tuple[Any, ...]) -> str:
    """As `keystr` gives it, a dictionary's key with slashes as several keys."""
    return jax.tree_util.keystr(path).replace("/", "']['")


def fingerprint(tree: Tree) -> str:
    """Hexadecimal digest of the names, shapes, dtypes and bits of a tree of 8- to 32-bit arrays; "" if it is empty.

    A name "a/b" counts as `b` below `a`.
    """
    return _digest(tree, _checksum)


def seal(tree: Tree) -> str:
    """As `fingerprint`, for what is stored: no change of a single element, a flipped bit say, leaves it as it was."""
    return _digest(tree, _mixed_checksum)


def _digest(tree: Tree, checksum_of: Callable[[jax.Array], Any]) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    if not leaves:
        return ""
    digest = hashlib.sha256()
    for path, leaf in leaves:
        checksum = int(
            checksum_of(leaf)
        )  # one at a time: on CPU devices, independent programs with collectives deadlock
        digest.update(f"{_name(path)} {leaf.shape} {leaf.dtype} {checksum}\n".encode())
    return digest.hexdigest()[:32]
