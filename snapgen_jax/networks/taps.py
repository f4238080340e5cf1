"""Named intermediates of a network: returned when asked for, replaced when given.

An intermediate is the output of one of the network's modules. `taps=("mid",)` returns it, and `reuse={"mid": ...}` puts
a value from elsewhere in its place, such as the same intermediate one sampling step earlier. A network runs such a
module through `Taps.module`, and one with intermediates of its own through `Taps.block`; blocks that are one scan go
through `depth.scan(taps=..., reuse=..., inside=...)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

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

    DTYPE: ClassVar[Any] = jnp.bool_  # of `run` as an array

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

    Here `run` is the share r: a float array, scalar or `[B]`, or a function that returns one. It takes the place of
    modules; a block that is one layer of a scan is replaced whole or not at all.
    """

    DTYPE: ClassVar[Any] = jnp.float32

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


class Taps:
    """Collects the intermediates named in `wanted`, and runs what `reuse` does not replace.

    Attributes:
        reuse: `{name: Reuse}`; an array stands for `Reuse(array)`.
        found: `{name: intermediate}` of those that are wanted, as they come.

    Raises:
        ValueError: a wanted or given name is not among `names`.
    """

    def __init__(self, names: Sequence[str], wanted: Sequence[str], reuse: Mapping[str, Reuse | jax.Array] | None):
        self.names = tuple(names)
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

    def entered(self, name: str, function: Callable[[jax.Array], jax.Array], x: jax.Array, dtype: Any) -> jax.Array:
        """`function(x)`, the intermediate called `name`, where what enters it has a name too: `name_input`.

        Args:
            name: of what leaves the module.
            function: the module.
            x: what enters it.
            dtype: of what enters as an intermediate: one dtype, whether it is returned or read by `Reuse.run`.
        """
        entering = f"{name}_input"
        if self.touches(entering, name):
            x = self.module(entering, lambda x: x, x.astype(dtype))
        return self.module(name, function, x)

    def touches(self, *names: str) -> bool:
        """Whether any of these intermediates is wanted or replaced."""
        return any(name in self.wanted or name in self.reuse for name in names)

    def block(
        self,
        names: str | Sequence[str],
        function: Callable[..., jax.Array],
        x: jax.Array,
        *args: Any,
        remat: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> jax.Array:
        """`function(x, *args, tap)`, a module whose own intermediates have names that begin with its name.

        Where one of those is wanted, all of the module runs, even if its output is replaced: nothing can be returned
        from inside a branch.

        Args:
            names: of the module, as for `module`; those inside begin with the first.
            function: the module. `tap` is the `Taps` of `inside`.
            x, args: as for `module`.
            remat: wraps a function of arrays, as `jax.checkpoint` does.
        """
        names = (names,) if isinstance(names, str) else names
        inner = self.inside(names[0])
        if not inner.wanted:
            return self.module(names, lambda x, *args: inner.within(remat, function, x, *args), x, *args)
        output = inner.within(remat, function, x, *args)
        self.take(names[0], inner)
        return self.module(names, lambda x, *args: output, x, *args)

    def inside(self, block: str) -> Taps:
        """What is wanted and replaced inside a block, by its names there: "ffn" is "block_00_ffn" of the whole."""
        start = f"{block}_"

        def inner(names: Iterable[str]) -> list[str]:
            return [name.removeprefix(start) for name in names if name.startswith(start)]

        reuse = {name: self.reuse[f"{start}{name}"] for name in inner(self.reuse)}
        return Taps(inner(self.names), inner(self.wanted), reuse)

    def take(self, block: str, inner: Taps) -> None:
        """Adds what was found inside a block."""
        self.found.update({f"{block}_{name}": x for name, x in inner.found.items()})

    def within(
        self,
        remat: Callable[[Callable[..., Any]], Callable[..., Any]],
        function: Callable[..., jax.Array],
        x: jax.Array,
        *args: Any,
    ) -> jax.Array:
        """`function(x, *args, tap)` under a wrapper such as `jax.checkpoint`; `tap` has the names of this one, and what
        it finds is found here."""

        def whole(x: jax.Array, *args: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            tap = Taps(self.names, tuple(self.wanted), self.reuse)
            return function(x, *args, tap), tap.found

        output, found = remat(whole)(x, *args)
        self.found.update(found)
        return output


NO_TAPS = Taps((), (), None)
"""Nothing is wanted and nothing replaced."""
