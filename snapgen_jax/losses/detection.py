"""What a density map should be, given the objects of an image, and how unlikely what is there makes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SPREAD = 0.5  # standard deviation of an object's mass, in cells


def splatted(places: jax.Array, height: int, width: int) -> jax.Array:
    """One unit of mass for each place, a Gaussian around it (Lempitsky and Zisserman 2010, section 3).

    Args:
        places: `[B, N, 2]` float32, (x, y) from -1 at the left and top edge to 1 at the right and bottom edge.
        height, width: of the map, in cells.

    Returns:
        `[B, N, height, width]` float32. Each sums to one, also where a part of the Gaussian lies outside; a place
        outside of the image has no mass.
    """

    def along(x: jax.Array, cells: int) -> jax.Array:
        offset = (jnp.arange(cells) + 0.5) - (x[..., None] + 1) / 2 * cells
        return jax.nn.softmax(-0.5 * jnp.square(offset / SPREAD), axis=-1)

    inside = (jnp.abs(places) <= 1).all(axis=-1)
    across, down = along(places[..., 0], width), along(places[..., 1], height)
    return inside[..., None, None] * down[..., :, None] * across[..., None, :]


def detection_loss(
    mass: jax.Array,
    log_kind: jax.Array,
    log_colour: jax.Array,
    objects: jax.Array,
    places: jax.Array,
    amounts: jax.Array,
) -> jax.Array:
    """How unlikely the objects of an image are: the deviance of a Poisson process, whose points have a kind and colour.

        L = sum_x [m(x) - y(x) + y(x) log(y(x) / m(x))] - sum_i a_i sum_x g_i(x) [log p_x(kind_i) + log p_x(colour_i)]

    with y = sum_i a_i g_i, and g_i the mass of object i over the cells x. Unlike a squared error it tells a small mass
    from a still smaller one, and so teaches the logarithm of the mass of what is not there.

    Args:
        mass: m, `[B, H, W]` float32 > 0.
        log_kind, log_colour: `[B, H, W, K]` and `[B, H, W, C]` float32.
        objects: `[B, N, 2]` int32, the kind and the colour of each, from 1 on; 0 for none.
        places: `[B, N, 2]` float32, as for `splatted`.
        amounts: a, `[B, N]` float32, how much of each object the image shows.

    Returns:
        `[B]` float32 >= 0.
    """
    amounts = jnp.where(objects[..., 0] > 0, amounts, 0.0)
    each = amounts[..., None, None] * splatted(places, *mass.shape[1:])  # [B, N, H, W]
    y = each.sum(axis=1)
    deviance = mass - y + jnp.where(y > 0, y * (jnp.log(jnp.maximum(y, 1e-12)) - jnp.log(mass)), 0)
    kinds = jnp.einsum("bnhw,bnk->bhwk", each, jax.nn.one_hot(objects[..., 0] - 1, log_kind.shape[-1]))
    colours = jnp.einsum("bnhw,bnc->bhwc", each, jax.nn.one_hot(objects[..., 1] - 1, log_colour.shape[-1]))
    named = jnp.sum(kinds * log_kind, axis=(1, 2, 3)) + jnp.sum(colours * log_colour, axis=(1, 2, 3))
    return deviance.sum(axis=(1, 2)) - named
