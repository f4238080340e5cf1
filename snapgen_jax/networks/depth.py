"""Depth as one scan: equal layers stored as one stack, run by one `lax.scan`, with a few of them tapped.

A loop over layers in Python makes the program, and the time to compile it, grow with the depth. Here the parameters of
`layers` equal modules carry a leading layer axis, and the body is compiled once.

The features of tapped layers travel in a buffer with one slot a tap. The two obvious ways cost far more: returning the
features of every layer from the scan keeps all of them alive, and splitting the stack at the taps copies its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.module import shard, take_apart

Remat = Literal["none", "block"]
LayerT = TypeVar("LayerT", bound=nnx.Module)
Carry = Any


def stack(make: Callable[[nnx.Rngs], LayerT], layers: int, rngs: nnx.Rngs) -> LayerT:
    """`layers` modules made by `make`, as one module whose parameters have a leading axis `[layers, ...]`.

    Each layer is drawn from a key of its own. The result is only a container: run it with `scan`.
    """
    join, _ = take_apart(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    params = jax.vmap(lambda key: take_apart(make(nnx.Rngs(key)))[1])(jax.random.split(rngs.params(), layers))
    return join(params)  # type: ignore[return-value]


def scan(
    body: Callable[[LayerT, Carry], Carry],
    layers: LayerT,
    carry: Carry,
    *,
    taps: Sequence[int] = (),
    feature: Callable[[Carry], jax.Array] = lambda carry: carry,
    remat: Remat = "none",
) -> tuple[Carry, dict[int, jax.Array]]:
    """Runs a stack: `carry = body(layer, carry)` for every layer in turn.

    Args:
        body: one layer; the carry keeps its shapes and dtypes.
        layers: a module made by `stack`.
        taps: indices of the layers whose output is also returned.
        feature: picks the tapped array `[B, ...]` out of the carry.
        remat: "block" keeps only the carry between layers for the backward pass, and recomputes inside a layer.

    Returns:
        the last carry, and `{tap: feature(carry after that layer)}`. Taps cost one feature of memory each.
    """
    join, params = take_apart(layers)
    depth = jax.tree.leaves(params)[0].shape[0]
    _check_taps(taps, depth)

    def layer(params: Any, carry: Carry) -> Carry:
        return body(join(params), carry)  # type: ignore[arg-type]

    if remat == "block":
        layer = jax.checkpoint(layer, prevent_cse=False)  # inside a scan nothing can be shared with the forward pass

    if not taps:
        carry, _ = jax.lax.scan(lambda carry, params: (layer(params, carry), None), carry, params)
        return carry, {}

    slots = {tap: slot for slot, tap in enumerate(taps)}
    slot_of_layer = jnp.array([slots.get(i, 0) for i in range(depth)])
    is_tapped = jnp.array([i in slots for i in range(depth)])

    def step(state: tuple[Carry, jax.Array], xs: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, None]:
        (carry, buffer), (params, slot, tapped) = state, xs
        carry = layer(params, carry)
        held = jax.lax.dynamic_index_in_dim(buffer, slot, axis=1, keepdims=False)
        update = jnp.where(tapped, feature(carry), held)
        return (carry, jax.lax.dynamic_update_index_in_dim(buffer, update, slot, axis=1)), None

    first = feature(carry)
    buffer = shard(jnp.zeros((first.shape[0], len(taps), *first.shape[1:]), first.dtype))
    (carry, buffer), _ = jax.lax.scan(step, (carry, buffer), (params, slot_of_layer, is_tapped))
    return carry, {tap: buffer[:, slot] for tap, slot in slots.items()}


def _check_taps(taps: Sequence[int], depth: int) -> None:
    wrong = [tap for tap in taps if not 0 <= tap < depth]
    if wrong or len(set(taps)) != len(taps):
        raise ValueError(
            f"taps {tuple(taps)} of a stack of {depth} layers: expected distinct indices from 0 to {depth - 1}"
        )
