"""Depth as one scan: equal layers stored as one stack, run by one `lax.scan`, with a few of them tapped.

A loop over layers in Python makes the program, and the time to compile it, grow with the depth. Here the parameters of
`layers` equal modules carry a leading layer axis, and the body is compiled once.

The features of tapped layers travel in a buffer with one slot a tap. The two obvious ways cost far more: returning the
features of every layer from the scan keeps all of them alive, and splitting the stack at the taps copies its weights.
Features that replace a layer's (see `networks/taps.py`) lie in slots in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.module import rngs_of, shard, take_apart
from snapgen_jax.networks.taps import Reuse, decision, select_rows

Remat = Literal["none", "block"]
LayerT = TypeVar("LayerT", bound=nnx.Module)
Carry = Any


def stack(make: Callable[[nnx.Rngs], LayerT], layers: int, rngs: nnx.Rngs) -> LayerT:
    """`layers` modules made by `make`, as one module whose parameters have a leading axis `[layers, ...]`.

    Each layer is drawn from a key of its own. The result is only a container: run it with `scan`.
    """
    joins = []

    def one(key: jax.Array) -> Any:
        join, params = take_apart(make(rngs_of(key, like=rngs)))
        joins.append(join)  # the same of every layer
        return params

    params = jax.vmap(one)(jax.random.split(rngs.params(), layers))
    return joins[0](params)


def scan(
    body: Callable[[LayerT, Carry], Carry],
    layers: LayerT,
    carry: Carry,
    *,
    taps: Sequence[int] = (),
    reuse: Mapping[int, Reuse] | None = None,
    feature: Callable[[Carry], jax.Array] = lambda carry: carry,
    replace: Callable[[Carry, jax.Array], Carry] = lambda carry, feature: feature,
    remat: Remat = "none",
) -> tuple[Carry, dict[int, jax.Array]]:
    """Runs a stack: `carry = body(layer, carry)` for every layer in turn.

    Args:
        body: one layer; the carry keeps its shapes and dtypes.
        layers: a module made by `stack`.
        taps: indices of the layers whose output is also returned.
        reuse: by index, features to take in place of a layer's. Such a layer is skipped by `lax.cond` inside the scan:
            the stack is not split. Where a `run` has rows, every array of the carry is `[B, ...]`, and a layer is
            skipped if no row runs.
        feature: picks the tapped array `[B, ...]` out of the carry; `Reuse.run` is given that of the carry that enters.
        replace: puts a feature into the carry that enters a layer: the carry after that layer, if it is skipped.
        remat: "block" keeps only the carry between layers for the backward pass, and recomputes inside a layer.

    Returns:
        the last carry, and `{tap: feature(carry after that layer)}`. Taps cost one feature of memory each.

    Raises:
        ValueError: an index is not one of the stack, or a replacement does not fit.
    """
    join, params = take_apart(layers)
    depth = jax.tree.leaves(params)[0].shape[0]
    reuse = {i: given for i, given in (reuse or {}).items() if given.run is not True}
    _check_indices("taps", taps, depth)
    _check_indices("reuse", tuple(reuse), depth)

    def run(params: Any, carry: Carry) -> Carry:
        return body(join(params), carry)  # type: ignore[arg-type]

    layer: Callable[[Any, Carry], Carry] = run
    if remat == "block":
        layer = jax.checkpoint(layer, prevent_cse=False)  # inside a scan nothing can be shared with the forward pass
    if reuse:
        layer, params = _skipping(layer, params, reuse, carry, feature, replace)

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


def _skipping(
    layer: Callable[[Any, Carry], Carry],
    params: Any,
    reuse: Mapping[int, Reuse],
    carry: Carry,
    feature: Callable[[Carry], jax.Array],
    replace: Callable[[Carry, jax.Array], Carry],
) -> tuple[Callable[[Any, Carry], Carry], Any]:
    """A layer that is skipped where `reuse` says, and what the scan gives it: parameters, slot, function and flag."""
    first, depth = feature(carry), jax.tree.leaves(params)[0].shape[0]
    batch = first.shape[0]
    values = jnp.stack([given.fitted(first, f"of layer {i}") for i, given in reuse.items()])  # [slots, B, ...]
    slots = {i: slot for slot, i in enumerate(reuse)}

    # A layer runs if its flag says so, or, where its number is not 0, if that function of what enters it does.
    functions = list(dict.fromkeys(given.run for given in reuse.values() if callable(given.run)))
    runs = [reuse[i].run if i in reuse else True for i in range(depth)]
    numbers = [1 + functions.index(run) if callable(run) else 0 for run in runs]
    flags = [jnp.array(True) if callable(run) else decision(run, batch, f"of layer {i}") for i, run in enumerate(runs)]
    shapes = [jax.eval_shape(lambda function=function: function(first)).shape for function in functions]
    by_rows = any(shape != () for shape in (*shapes, *(flag.shape for flag in flags)))

    def choice(run: Any) -> jax.Array:
        run = decision(run, batch, "of a layer")
        return jnp.broadcast_to(run, (batch,)) if by_rows else run

    branches = [lambda flag, x: flag, *(lambda flag, x, f=f: choice(f(x)) for f in functions)]

    def skippable(xs: Any, carry: Carry) -> Carry:
        params, slot, number, flag = xs
        run = jax.lax.switch(number, branches, flag, feature(carry)) if functions else flag

        def skip() -> Carry:
            return replace(carry, jax.lax.dynamic_index_in_dim(values, slot, keepdims=False))

        if not by_rows:
            return jax.lax.cond(run, lambda: layer(params, carry), skip)
        return jax.lax.cond(jnp.any(run), lambda: select_rows(run, layer(params, carry), skip()), skip)

    slot_of_layer = jnp.array([slots.get(i, 0) for i in range(depth)])
    return skippable, (params, slot_of_layer, jnp.array(numbers), jnp.stack([choice(flag) for flag in flags]))


def _check_indices(what: str, indices: Sequence[int], depth: int) -> None:
    wrong = [i for i in indices if not 0 <= i < depth]
    if wrong or len(set(indices)) != len(indices):
        raise ValueError(
            f"{what} {tuple(indices)} of a stack of {depth} layers: expected distinct indices from 0 to {depth - 1}"
        )
