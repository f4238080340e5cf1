"""Decoding a large latent in overlapping tiles, so that memory follows the tile and not the image."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def decode_tiled(decode: Callable[[jax.Array], jax.Array], latents: jax.Array, *, tile: int, overlap: int) -> jax.Array:
    """Decodes tile by tile, and blends neighbours linearly where they overlap.

    The tiles are equal and evenly spread, so that one compiled `decode` serves all. A decoder that looks no further
    than its own pixel gives the same image as without tiles. One that takes statistics or attends over its whole input
    (group normalisation, attention) sees less of it in a tile, and differs a little everywhere.

    Args:
        decode: `[B, th, tw, c] -> [B, f*th, f*tw, 3]` for any th, tw and a fixed f.
        latents: `[B, h, w, c]`.
        tile: largest side of a tile in latent pixels.
        overlap: least overlap of neighbours in latent pixels, below `tile`.

    Returns:
        `[B, f*h, f*w, 3]`; exactly `decode(latents)` where the latents fit into one tile.

    Raises:
        ValueError: the overlap is not below the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}; give an overlap from 0 to {tile - 1}")
    b, h, w, c = latents.shape
    if h <= tile and w <= tile:
        return decode(latents)
    th, tw = min(tile, h), min(tile, w)
    one = jax.eval_shape(decode, jax.ShapeDtypeStruct((b, th, tw, c), latents.dtype))
    factor, channels = one.shape[1] // th, one.shape[3]

    tops, lefts = _starts(h, th, overlap), _starts(w, tw, overlap)
    ramp_y, ramp_x = _ramp(th * factor, overlap * factor), _ramp(tw * factor, overlap * factor)
    window = jnp.asarray(np.outer(ramp_y, ramp_x), jnp.float32)[:, :, None]
    total = np.outer(_sum(ramp_y, tops * factor, h * factor), _sum(ramp_x, lefts * factor, w * factor))

    def add(image: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        top, left = corner
        part = decode(jax.lax.dynamic_slice(latents, (0, top, left, 0), (b, th, tw, c)))
        place = (0, top * factor, left * factor, 0)
        so_far = jax.lax.dynamic_slice(image, place, one.shape)
        return jax.lax.dynamic_update_slice(image, so_far + window * part, place), None

    corners = np.stack(np.meshgrid(tops, lefts, indexing="ij"), axis=-1).reshape(-1, 2)
    image = jnp.zeros((b, h * factor, w * factor, channels), jnp.float32)
    image, _ = jax.lax.scan(add, image, jnp.asarray(corners, jnp.int32))
    return (image / jnp.asarray(total, jnp.float32)[:, :, None]).astype(one.dtype)


def _starts(size: int, tile: int, overlap: int) -> np.ndarray:
    """Evenly spread beginnings of the fewest tiles that cover `size` with at least this overlap."""
    count = 1 if tile == size else -(-(size - overlap) // (tile - overlap))
    return np.round(np.linspace(0, size - tile, count)).astype(int)


def _ramp(size: int, overlap: int) -> np.ndarray:
    """Weights that rise over the overlap, stay at one, and fall over the overlap."""
    position = np.arange(size) + 0.5
    return np.minimum(1, np.minimum(position, size - position) / max(overlap, 0.5))


def _sum(ramp: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    total = np.zeros(size)
    for start in starts:
        total[start : start + len(ramp)] += ramp
    return total
