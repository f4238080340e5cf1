"""Named intermediates of a network: returned when asked for, replaced when given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax


class Taps:
    """Collects the intermediates named in `wanted`, and swaps in those given in `reuse`.

    What only fed a replaced intermediate is dead code, which `jax.jit` removes.

    Raises:
        ValueError: a wanted or given name is not among `names`.
    """

    def __init__(self, names: Sequence[str], wanted: Sequence[str], reuse: Mapping[str, jax.Array] | None):
        self.reuse = dict(reuse or {})
        self.wanted = set(wanted)
        self.found: dict[str, jax.Array] = {}
        if unknown := sorted((self.wanted | self.reuse.keys()) - set(names)):
            raise ValueError(f"unknown intermediate {', '.join(unknown)}; the network has {', '.join(names)}")

    def __call__(self, value: jax.Array, *names: str) -> jax.Array:
        """Passes `value` on, or its replacement; more than one name for it are aliases.

        Raises:
            ValueError: the replacement has another shape.
        """
        for name in names:
            if name in self.reuse:
                given = self.reuse[name]
                if given.shape != value.shape:
                    raise ValueError(
                        f"intermediate {name} has shape {value.shape}; the one given to reuse has {given.shape}"
                    )
                value = given.astype(value.dtype)
        self.found.update({name: value for name in names if name in self.wanted})
        return value
