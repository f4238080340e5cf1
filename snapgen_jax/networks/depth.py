"""Depth as one scan: equal layers stored as one stack, run by one `lax.scan`, with a few of them tapped.

A loop over layers in Python makes the program, and the time to compile it, grow with the depth. Here the parameters of
`layers` equal modules carry a leading layer axis, and the body is compiled once.

The features of tapped layers travel in a buffer with one slot a tap. The two obvious ways cost far more: returning the
features of every layer from the scan keeps all of them alive, and splitting the stack at the taps copies its weights.
Features that replace a layer's (see `networks/taps.py`) lie in slots in the same way. What is wanted or replaced inside
the layers, as by gates of all their modules, is asked of many of them at once: it is stacked like the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.module import rngs_of, shard, take_apart
from snapgen_jax.networks.taps import Reuse, Taps, select_rows

Remat = Literal["none", "block"]
LayerT = TypeVar("LayerT", bound=nnx.Module)
Carry = Any
Tree = Any

Layer = Callable[[Any, Carry], tuple[Carry, dict[str, jax.Array]]]


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
    body: Callable[..., Carry],
    layers: nnx.Module,
    carry: Carry,
    *,
    taps: Sequence[int] = (),
    reuse: Mapping[int, Reuse] | None = None,
    inside: Sequence[Taps] = (),
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
        inside: a `Taps` for each layer, of the intermediates inside it; none where they have no names. With them the
            call is `body(layer, carry, tap)`, and each finds its own. The body is still one: what is wanted of any
            layer costs memory in all, and so do values in place of an intermediate, which are all of one shape and one
            kind of `Reuse`.
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
    values, taps_of = _stacked(inside, depth)

    def run(xs: tuple[Tree, Tree], carry: Carry) -> tuple[Carry, dict[str, jax.Array]]:
        params, values = xs
        if not inside:
            return body(join(params), carry), {}
        tap = taps_of(values)
        return body(join(params), carry, tap), tap.found

    layer: Layer = run
    if remat == "block":
        layer = jax.checkpoint(layer, prevent_cse=False)  # inside a scan nothing can be shared with the forward pass
    xs: Any = (params, values)
    if reuse:
        layer, xs = _skipping(layer, xs, reuse, carry, feature, replace, any(tap.wanted for tap in inside))

    if not taps:
        carry, found = jax.lax.scan(lambda carry, xs: layer(xs, carry), carry, xs)
        _hand_out(found, inside)
        return carry, {}

    slots = {tap: slot for slot, tap in enumerate(taps)}
    slot_of_layer = jnp.array([slots.get(i, 0) for i in range(depth)])
    is_tapped = jnp.array([i in slots for i in range(depth)])

    def step(state: tuple[Carry, jax.Array], xs: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, Tree]:
        (carry, buffer), (of_layer, slot, tapped) = state, xs
        carry, found = layer(of_layer, carry)
        held = jax.lax.dynamic_index_in_dim(buffer, slot, axis=1, keepdims=False)
        update = jnp.where(tapped, feature(carry), held)
        return (carry, jax.lax.dynamic_update_index_in_dim(buffer, update, slot, axis=1)), found

    first = feature(carry)
    buffer = shard(jnp.zeros((first.shape[0], len(taps), *first.shape[1:]), first.dtype))
    (carry, buffer), found = jax.lax.scan(step, (carry, buffer), (xs, slot_of_layer, is_tapped))
    _hand_out(found, inside)
    return carry, {tap: buffer[:, slot] for tap, slot in slots.items()}


def _skipping(
    layer: Layer,
    xs: tuple[Tree, Tree],
    reuse: Mapping[int, Reuse],
    carry: Carry,
    feature: Callable[[Carry], jax.Array],
    replace: Callable[[Carry, jax.Array], Carry],
    whole: bool,
) -> tuple[Layer, Any]:
    """A layer that is skipped where `reuse` says, and what the scan gives it. `whole` layers run all the same, since
    nothing can be returned from inside a branch, and their output is replaced."""
    first, depth = feature(carry), jax.tree.leaves(xs)[0].shape[0]
    if shared := [i for i, given in reuse.items() if given.DTYPE is not Reuse.DTYPE]:
        raise ValueError(
            f"layer {shared[0]} is given a {type(reuse[shared[0]]).__name__}; layers of a scan run or do not: replace "
            "what is inside them by shares"
        )
    values = jnp.stack([given.fitted(first, f"of layer {i}") for i, given in reuse.items()])  # [slots, B, ...]
    slots = {i: slot for slot, i in enumerate(reuse)}
    runs = _Runs(reuse, depth, first.shape[0], "of a layer")

    def skippable(xs: Any, carry: Carry) -> tuple[Carry, dict[str, jax.Array]]:
        of_layer, slot, of_run = xs
        run = runs.of_layer(of_run, feature(carry))
        output, found = layer(of_layer, carry) if whole else (None, {})

        def module() -> Carry:
            return output if whole else layer(of_layer, carry)[0]

        def skip() -> Carry:
            return replace(carry, jax.lax.dynamic_index_in_dim(values, slot, keepdims=False))

        if run.ndim == 0:
            return jax.lax.cond(run, module, skip), found
        return jax.lax.cond(jnp.any(run), lambda: select_rows(run, module(), skip()), skip), found

    slot_of_layer = jnp.array([slots.get(i, 0) for i in range(depth)])
    return skippable, (xs, slot_of_layer, runs.xs)


def _stacked(inside: Sequence[Taps], depth: int) -> tuple[Tree, Callable[[Tree], Taps]]:
    """What replaces intermediates inside the layers, stacked for a scan to go through, and the `Taps` of one layer."""
    if not inside:
        return {}, lambda _: Taps((), (), None)
    names = tuple(dict.fromkeys(name for tap in inside for name in tap.names))
    wanted = tuple(name for name in names if any(name in tap.wanted for tap in inside))
    columns = {}
    for name in names:
        given = {i: tap.reuse[name] for i, tap in enumerate(inside) if name in tap.reuse}
        if given := {i: reuse for i, reuse in given.items() if reuse.run is not True}:
            columns[name] = _Column(name, given, depth)

    def of_layer(values: Tree) -> Taps:
        return Taps(names, wanted, {name: columns[name].of_layer(xs) for name, xs in values.items()})

    return {name: column.xs for name, column in columns.items()}, of_layer


def _hand_out(found: Mapping[str, jax.Array], inside: Sequence[Taps]) -> None:
    """To each layer's `Taps` what it wants of the stacks `[layers, ...]` that a scan returned."""
    for i, tap in enumerate(inside):
        tap.found.update({name: found[name][i] for name in tap.wanted})


class _Column:
    """What replaces one intermediate in the layers of a stack.

    Attributes:
        xs: of which the scan gives each layer its own.
    """

    def __init__(self, name: str, given: Mapping[int, Reuse], depth: int):
        values = {i: reuse.value for i, reuse in given.items() if reuse.value is not None}
        if len(values) < len(given):
            raise ValueError(f"intermediate {name} has no value, and blocks that are one scan need one")
        first, kinds = next(iter(values.values())), {type(reuse) for reuse in given.values()}
        if len(kinds) > 1 or any(value.shape != first.shape for value in values.values()):
            raise ValueError(
                f"intermediate {name} of blocks that are one scan: give all values in one shape and as one kind of "
                f"Reuse, not as {', '.join(f'{type(r).__name__}{list(values[i].shape)}' for i, r in given.items())}"
            )
        (self.kind,) = kinds
        stack = jnp.stack([values.get(i, jnp.zeros_like(first)) for i in range(depth)])
        never = len(given) == depth and all(reuse.run is False for reuse in given.values())
        self.runs = None if never else _Runs(given, depth, first.shape[0], name)
        self.xs = (stack, self.runs.xs if self.runs else ())

    def of_layer(self, xs: Any) -> Reuse:
        """That of one layer. A module that no layer runs is no part of the program."""
        (value, of_run), runs = xs, self.runs
        return self.kind(value, False if runs is None else lambda x: runs.of_layer(of_run, x))


class _Runs:
    """Whether, or by how much, each layer of a stack runs.

    Attributes:
        xs: of which the scan gives each layer its own: the number of the function that decides by what enters the
            layer, and where that is 0 the decision.
    """

    def __init__(self, given: Mapping[int, Reuse], depth: int, batch: int, name: str):
        first = next(iter(given.values()))
        self.checked = lambda run: first.checked(run, batch, name)
        self.batch = batch
        runs = [given[i].run if i in given else True for i in range(depth)]
        self.functions = list(dict.fromkeys(run for run in runs if callable(run)))
        numbers = [1 + self.functions.index(run) if callable(run) else 0 for run in runs]
        static = [callable(run) or isinstance(run, bool) for run in runs]
        known = [jnp.array(run is not False, first.DTYPE) if s else run for s, run in zip(static, runs, strict=True)]
        flags = [self.checked(run) for run in known]
        by_rows = any(flag.shape for flag in flags)
        self.xs = jnp.array(numbers), jnp.stack([self._fitted(flag, by_rows) for flag in flags])

    def of_layer(self, xs: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        """`run` of one layer as an array, scalar or `[B]`, given what enters it."""
        number, flag = xs
        if not self.functions:
            return flag
        by_rows = any(run.shape for run in (flag, *(jax.eval_shape(f, x) for f in self.functions)))

        def of(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
            return lambda flag, x: self._fitted(self.checked(function(x)), by_rows).astype(flag.dtype)

        branches = [lambda flag, x: self._fitted(flag, by_rows), *map(of, self.functions)]
        return jax.lax.switch(number, branches, flag, x)

    def _fitted(self, run: jax.Array, by_rows: bool) -> jax.Array:
        return jnp.broadcast_to(run, (self.batch,)) if by_rows else run


def _check_indices(what: str, indices: Sequence[int], depth: int) -> None:
    wrong = [i for i in indices if not 0 <= i < depth]
    if wrong or len(set(indices)) != len(indices):
        raise ValueError(
            f"{what} {tuple(indices)} of a stack of {depth} layers: expected distinct indices from 0 to {depth - 1}"
        )
