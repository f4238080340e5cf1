"""Several sources as one: their examples one after the other, drawn by weights.

The pipeline gives every domain an order of its own, and mixes the orders by weight with grain. A domain costs no thread
and no buffer, however many there are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from snapgen_jax.data.arrays import ArraySpec, Example, listed
from snapgen_jax.data.errors import DataError

if TYPE_CHECKING:
    from snapgen_jax.data.sources import Indices, Source


class Domain(NamedTuple):
    """One source of a mixture.

    Attributes:
        source: its examples.
        start: index in the mixture of its first.
        weight: how often one of its examples is drawn, relative to one of another domain.
    """

    source: Source
    start: int
    weight: float


class Mixture:
    """See the top of this file. Implements `sources.Source`.

    Attributes:
        domains: the sources, in order.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[float]):
        """
        Args:
            sources: at least one.
            shares: of the examples drawn, relative to each other.

        Raises:
            DataError: the sources have no entry in common, or declare one differently.
        """
        starts = np.cumsum([0, *(len(source) for source in sources)]).tolist()
        self.domains = tuple(
            Domain(source, start, share / len(source))
            for source, start, share in zip(sources, starts, shares, strict=False)
        )
        self._starts, self._count = starts[:-1], starts[-1]
        self._spec = _common([source.spec() for source in sources])
        self.held_out = all(source.held_out for source in sources)

    def __len__(self) -> int:
        return self._count

    def spec(self) -> dict[str, ArraySpec]:
        """The entries that every domain has."""
        return self._spec

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """An example of the domain that the index lies in."""
        domain = self._domain(index)
        return domain.source.example(index - domain.start, rng, names)

    def name(self, index: int) -> str:
        """As its domain calls it."""
        domain = self._domain(index)
        return domain.source.name(index - domain.start)

    def sizes(self) -> None:
        """None: the pipeline asks each domain."""

    def buckets(self) -> None:
        """None: the pipeline asks each domain."""

    def _domain(self, index: int) -> Domain:
        return self.domains[int(np.searchsorted(self._starts, index, side="right")) - 1]


def domains_of(source: Source) -> tuple[Domain, ...]:
    """Those of a mixture; a source that is none is one domain, each of whose examples has the weight 1."""
    return source.domains if isinstance(source, Mixture) else (Domain(source, 0, 1.0),)


def shifted(indices: Indices, start: int) -> Indices:
    """Indices in a domain as indices in the mixture."""
    if isinstance(indices, range):
        return range(indices.start + start, indices.stop + start, indices.step)
    return indices + start


def _common(specs: Sequence[dict[str, ArraySpec]]) -> dict[str, ArraySpec]:
    first, *others = specs
    common = {name: spec for name, spec in first.items() if all(name in other for other in others)}
    for number, other in enumerate(others, 1):
        differing = [name for name in common if other[name] != common[name]]
        if differing or not common:
            raise DataError(
                f"data.mixture: source 0 has {listed(first)}, and source {number} has {listed(other)}; mix sources "
                "whose entries of one name are alike"
            )
    return common
