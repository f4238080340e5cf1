"""Named intermediates of a network: returned when asked for, replaced when given.

An intermediate is the output of one of the network's modules. `taps=("mid",)` returns it, and `reuse={"mid": ...}` puts
a value from elsewhere in its place, such as the same intermediate one sampling step earlier. A network runs such a
module through `Taps.module`; blocks that are one scan go through `depth.scan(taps=..., reuse=...)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Run = bool | jax.Array | Callable[[jax.Array], jax.Array]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Reuse:
    """A value for an intermediate, and whether the module that makes it runs all the same.

    A pytree: `value` is a leaf, and so is `run` where it is an array. A bool or a function belongs to the structure, so
    a new function traces anew what takes the `Reuse` as an argument; make it inside the jitted function.

    Attributes:
        value: of the intermediate's shape; it takes the intermediate's dtype. None for what enters the module, so that
            the module is the identity where it does not run; its input and output must then have one shape. Blocks that
            are one scan need a value.
        run: decides between the value and the module.

            - `False`: the value; the module is no part of the program.
            - `True`: the module, as without `Reuse`.
            - a scalar bool array: one of them, by `lax.cond`. What does not run costs nothing.
            - a `[B]` bool array: the module where true and the value elsewhere, row by row. If any row runs, the module
              runs on every row; if none does, it does not run.
            - a function of the activation that enters the module, which returns either kind of array.
    """

    value: jax.Array | None
    run: Run = False

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Leaves, and what is static."""
        if isinstance(self.run, bool) or callable(self.run):
            return (self.value,), self.run
        return (self.value, self.run), None

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: tuple[Any, ...]) -> Reuse:
        """The inverse of `tree_flatten`."""
        return cls(*leaves) if len(leaves) == 2 else cls(leaves[0], static)

    def instead_of(
        self, function: Callable[..., jax.Array], x: jax.Array, *args: Any, name: str = "given"
    ) -> jax.Array:
        """`function(x, *args)`, or the value in its place.

        Raises:
            ValueError: `value` or `run` has a shape that does not fit; names the intermediate by `name`.
        """
        run = self.run(x) if callable(self.run) else self.run
        if run is True:
            return function(x, *args)
        like = jax.eval_shape(lambda: function(x, *args))
        if self.value is None and x.shape != like.shape:
            raise ValueError(
                f"intermediate {name} has shape {like.shape}, and what enters its module {x.shape}; give a value, or "
                "leave the module as it is"
            )
        value = x.astype(like.dtype) if self.value is None else self.fitted(like, name)
        if run is False:
            return value
        return self.chosen(self.checked(run, value.shape[0], name), lambda: function(x, *args), value)

    def checked(self, run: Any, batch: int, name: str) -> jax.Array:
        """`run` as an array; raises `ValueError` if it has another dtype or shape than it may have."""
        return decision(run, batch, name)

    def chosen(self, run: jax.Array, module: Callable[[], jax.Array], value: jax.Array) -> jax.Array:
        """What the module gives, or the value, by `run` as `checked`."""
        if run.ndim == 0:
            return jax.lax.cond(run, module, lambda: value)
        return jax.lax.cond(jnp.any(run), lambda: select_rows(run, module(), value), lambda: value)

    def fitted(self, like: Any, name: str) -> jax.Array:
        """The value in the dtype of `like`, an array or a `ShapeDtypeStruct`; raises if it has another shape."""
        if self.value is None:
            raise ValueError(f"intermediate {name} has no value, and a block in a scan needs one")
        if self.value.shape != like.shape:
            raise ValueError(
                f"intermediate {name} has shape {like.shape}; the one given to reuse has {self.value.shape}"
            )
        return self.value.astype(like.dtype)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Blend(Reuse):
    """A value that is mixed with what the module gives, for training what decides: `r module + (1 - r) value`.

    Here `run` is the share r: a float array, scalar or `[B]`, or a function that returns one. Blocks that are one scan
    take no shares.
    """

    def checked(self, run: Any, batch: int, name: str) -> jax.Array:
        """See `Reuse.checked`."""
        run = jnp.asarray(run)
        if not jnp.issubdtype(run.dtype, jnp.floating) or run.shape not in ((), (batch,)):
            raise ValueError(
                f"intermediate {name}: its share is {run.dtype}{list(run.shape)}; give one float, or [{batch}] of them"
            )
        return run

    def chosen(self, run: jax.Array, module: Callable[[], jax.Array], value: jax.Array) -> jax.Array:
        """The mixture, in the dtype of the value."""
        share = run.astype(jnp.float32).reshape(-1, *[1] * (value.ndim - 1))
        return (share * module() + (1 - share) * value).astype(value.dtype)


def decision(run: Any, batch: int, name: str) -> jax.Array:
    """`run` as a bool array, scalar or `[B]`; raises if it is neither."""
    run = jnp.asarray(run)
    if run.dtype != bool or run.shape not in ((), (batch,)):
        raise ValueError(
            f"intermediate {name}: whether it runs is {run.dtype}{list(run.shape)}; give one bool, or [{batch}] of them"
        )
    return run


def select_rows(run: jax.Array, computed: Any, other: Any) -> Any:
    """Rows of two trees of arrays `[B, ...]`: those of `computed` where `run` `[B]` is true."""
    return jax.tree.map(lambda a, b: jnp.where(run.reshape(-1, *[1] * (a.ndim - 1)), a, b), computed, other)


def run_block(
    reuse: Mapping[str, Reuse], name: str, function: Callable[..., jax.Array], x: jax.Array, *args: Any
) -> jax.Array:
    """`function(x, *args)`, or what `reuse` has in its place under that name."""
    return reuse[name].instead_of(function, x, *args, name=name) if name in reuse else function(x, *args)


class Taps:
    """Collects the intermediates named in `wanted`, and runs what `reuse` does not replace.

    Attributes:
        reuse: `{name: Reuse}`; an array stands for `Reuse(array)`.
        found: `{name: intermediate}` of those that are wanted, as they come.

    Raises:
        ValueError: a wanted or given name is not among `names`.
    """

    def __init__(self, names: Sequence[str], wanted: Sequence[str], reuse: Mapping[str, Reuse | jax.Array] | None):
        self.reuse = {name: x if isinstance(x, Reuse) else Reuse(x) for name, x in (reuse or {}).items()}
        self.wanted = set(wanted)
        self.found: dict[str, jax.Array] = {}
        if unknown := sorted((self.wanted | self.reuse.keys()) - set(names)):
            raise ValueError(f"unknown intermediate {', '.join(unknown)}; the network has {', '.join(names)}")

    def module(
        self, names: str | Sequence[str], function: Callable[..., jax.Array], x: jax.Array, *args: Any
    ) -> jax.Array:
        """`function(x, *args)`, the intermediate called `names`, or what replaces it.

        What only fed a module that does not run is dead code, which `jax.jit` removes.

        Args:
            names: one name, or several for one intermediate.
            function: the module.
            x: the activation that enters it, which a function in `Reuse.run` is given.
            args: what else it takes.

        Raises:
            ValueError: a replacement has another shape.
        """
        names = (names,) if isinstance(names, str) else names
        for name in names:
            if name in self.reuse:
                function = functools.partial(self.reuse[name].instead_of, function, name=name)
        value = function(x, *args)
        self.found.update({name: value for name in names if name in self.wanted})
        return value
