"""The combinations of the shapes world that training never shows.

Fixed by position in the lists of kinds and colours. Every kind, colour, number and relation is seen, and each kind is
seen with most colours, numbers and partners; only these combinations never are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from snapgen_jax.data.shapes import COLOURS, KINDS, OPPOSITE, RELATIONS, Group, Relation, Scene, SizeWord, holds


@functools.cache
def heldout_colour(colour: str, kind: str) -> bool:
    """One kind a colour: 8 of 48 pairs."""
    return (list(COLOURS).index(colour) + KINDS.index(kind)) % len(KINDS) == 0


@functools.cache
def heldout_pair(a: str, b: str) -> bool:
    """One partner a kind: 3 of 15 unordered pairs of different kinds."""
    return abs(KINDS.index(a) - KINDS.index(b)) == len(KINDS) // 2


@functools.cache
def heldout_number(count: int, kind: str) -> bool:
    """One of the numbers two to four a kind: 6 of 18."""
    return count == 2 + KINDS.index(kind) % 3


@functools.cache
def heldout_size(size: SizeWord, kind: str) -> bool:
    """One size word a kind: 6 of 12. Held out where an object is alone: elsewhere all objects are small."""
    return size == ("small", "large")[KINDS.index(kind) % 2]


@functools.cache
def heldout_relation(relation: Relation, a: str, b: str) -> bool:
    """6 of 30 ordered pairs of different kinds in each relation; "a left of b" is held out where "b right of a" is."""
    if relation in ("right of", "below"):
        relation, a, b = OPPOSITE[relation], b, a
    step = 1 if relation == "left of" else len(KINDS) - 1
    return (KINDS.index(b) - KINDS.index(a)) % len(KINDS) == step


def heldout_combinations(scene: Scene) -> tuple[str, ...]:
    """Every held-out combination that a scene shows or its caption says, in words; empty for a training scene."""
    found = {f"{o.colour} {o.kind}" for o in scene.objects if heldout_colour(o.colour, o.kind)}
    kinds = [o.kind for o in scene.objects]
    found |= {f"{kinds.count(k)} {k}" for k in kinds if heldout_number(kinds.count(k), k)}
    found |= {f"{g.size} {g.kind}" for g in scene.groups if g.size and heldout_size(g.size, g.kind)}
    for a, b in itertools.combinations(scene.objects, 2):
        if a.kind == b.kind:
            continue
        if heldout_pair(a.kind, b.kind):
            found.add(" and ".join(sorted((a.kind, b.kind))))
        for relation in RELATIONS:
            if heldout_relation(relation, a.kind, b.kind) and holds(relation, (a.x, a.y), (b.x, b.y)):
                found.add(f"{a.kind} {relation} {b.kind}")
    return tuple(sorted(found))


def is_heldout(scene: Scene) -> bool:
    """Whether a scene shows any combination that training never shows."""
    return bool(heldout_combinations(scene))


def said_heldout(groups: Sequence[Group], relation: Relation | None) -> bool:
    """Whether a caption says a held-out combination."""
    return (
        any(g.colour is not None and heldout_colour(g.colour, g.kind) for g in groups)
        or any(heldout_number(g.count, g.kind) for g in groups)
        or any(g.size is not None and heldout_size(g.size, g.kind) for g in groups)
        or any(heldout_pair(a.kind, b.kind) for a, b in itertools.combinations(groups, 2))
        or (relation is not None and heldout_relation(relation, groups[0].kind, groups[1].kind))
    )
