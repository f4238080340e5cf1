"""Patches of an image as tokens: where they stand, and what takes the place of a map of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from snapgen_jax.networks.taps import Reuse


def position_axes(rows: np.ndarray, columns: np.ndarray, width: int) -> tuple[jax.Array, jax.Array]:
    """The two parts of `positions`, which add up to it exactly: `[h, 1, D]` of rows and `[1, w, D]` of columns.

    Added to a map one after the other they need no table of its size, and no operator that a phone's GPU lacks.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** -(np.arange(quarter) / quarter)

    def axis(places: np.ndarray) -> np.ndarray:  # [n, D/2]
        angles = places[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    of_rows, of_columns = axis(rows)[:, None], axis(columns)[None]
    parts = (
        np.concatenate([np.zeros_like(of_rows), of_rows], axis=-1),
        np.concatenate([of_columns, np.zeros_like(of_columns)], axis=-1),
    )
    return jnp.asarray(parts[0], jnp.float32), jnp.asarray(parts[1], jnp.float32)


def positions(rows: np.ndarray, columns: np.ndarray, width: int) -> jax.Array:
    """Sine and cosine positions of a grid.

    Only the two axes are computed eagerly, so that the shapes of a full-size network cost nothing.

    Args:
        rows: `[h]` place of each row.
        columns: `[w]` place of each column.
        width: D of a token, a multiple of four.

    Returns:
        `[h, w, D]` float32: sines, then cosines, of the column in the first half of D and of the row in the second.

    Source: Vaswani et al. 2017, section 3.5, once an axis, as in He et al. 2022 (arXiv 2111.06377).
    """
    of_rows, of_columns = position_axes(rows, columns, width)
    return of_rows + of_columns


def to_map(tokens: jax.Array, height: int, patch: int) -> jax.Array:
    """Tokens `[B, h * w, p * p * C]`, the pixels of a patch row by row, to the map `[B, h * p, w * p, C]`.

    No array on the way has more than four axes, which is what phones' GPUs take: a pixel keeps its row of the patch.
    """
    b, length, width = tokens.shape
    rows = tokens.reshape(b * height, length // height, patch, width // patch).swapaxes(1, 2)  # [B h, p, w, p C]
    return rows.reshape(b, height * patch, length // height * patch, -1)


def on_tokens(name: str, reuse: Reuse, like: jax.ShapeDtypeStruct) -> Reuse:
    """A replacement, called `name`, of a map like `like` `[B, h, w, D]` as one of tokens `[B, h * w, D]`."""
    value = rearrange(reuse.fitted(like, name), "b h w d -> b (h w) d")
    run = reuse.run
    if callable(run):
        return dataclasses.replace(
            reuse, value=value, run=lambda tokens: run(rearrange(tokens, "b (h w) d -> b h w d", h=like.shape[1]))
        )
    return dataclasses.replace(reuse, value=value)
