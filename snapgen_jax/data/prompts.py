"""Prompts whose right answer is known: what each demands, and whether a set of objects meets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from snapgen_jax.data.shapes import COLOURS, KINDS, RELATIONS, Category, Relation, Scene, SceneObject, holds
from snapgen_jax.data.shapes_captions import caption
from snapgen_jax.data.shapes_grammar import ShapesConfig, sample_scene

# GenEval's six (arXiv:2310.11513, table 1) in its order.
CATEGORIES: tuple[Category, ...] = ("single_object", "two_objects", "counting", "colours", "position", "binding")
# As in GenEval, a position prompt names no colours: it asks for the relation alone.
_PROMPTS = ShapesConfig(relation_colours=0.0)
_ATTEMPTS = 10_000


@dataclasses.dataclass(frozen=True)
class Demand:
    """So many objects of a kind, of a colour where one is named."""

    kind: str
    count: int = 1
    colour: str | None = None

    def matches(self, item: SceneObject) -> bool:
        """Whether an object is one of those demanded."""
        return item.kind == self.kind and self.colour in (None, item.colour)


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a prompt demands of a picture: these objects, no others, and the first of them in relation to the second."""

    demands: tuple[Demand, ...]
    relation: Relation | None = None

    def met_by(self, objects: Sequence[SceneObject]) -> bool:
        """Whether the objects of a picture are exactly those demanded. Sizes are not looked at."""
        groups = [[item for item in objects if demand.matches(item)] for demand in self.demands]
        if [len(group) for group in groups] != [demand.count for demand in self.demands]:
            return False
        if sum(map(len, groups)) != len(objects):
            return False
        if self.relation is None:
            return True
        relation = self.relation
        return all(holds(relation, (a.x, a.y), (b.x, b.y)) for a in groups[0] for b in groups[1])

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Requirement:
        """The inverse of `to_json`. Raises ValueError on a word that the shapes world does not have."""
        demands = tuple(Demand(d["kind"], int(d["count"]), d["colour"]) for d in data["demands"])
        for demand in demands:
            if demand.kind not in KINDS or demand.colour not in (None, *COLOURS):
                raise ValueError(f"no such object in the shapes world: {demand}")
        if data["relation"] not in (None, *RELATIONS):
            raise ValueError(f"no such relation in the shapes world: {data['relation']!r}")
        return cls(demands, cast(Relation | None, data["relation"]))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        prompt: the text.
        requirement: what it demands.
        category: the skill it tests.
        heldout: whether it says a combination that training never shows.
    """

    prompt: str
    requirement: Requirement
    category: Category
    heldout: bool

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prompt:
        """The inverse of `to_json`."""
        requirement = Requirement.from_json(data["requirement"])
        return cls(data["prompt"], requirement, data["category"], bool(data["heldout"]))


def requirement(scene: Scene) -> Requirement:
    """What the caption of a scene demands. Size words are not demanded."""
    return Requirement(tuple(Demand(g.kind, g.count, g.colour) for g in scene.groups), scene.relation)


def make_prompts(category: Category, heldout: bool, n: int, seed: int = 0) -> list[Prompt]:
    """Draws `n` different prompts of a category; the same arguments give the same prompts.

    Args:
        category: one of `CATEGORIES`, or "mixed".
        heldout: True for prompts that say a held-out combination, False for those whose combinations are all seen.
        n: how many. Raises ValueError where the grammar has fewer.
        seed: of the draws.
    """
    return [prompt for prompt, _ in make_prompts_with_scenes(category, heldout, n, seed)]


def make_prompts_with_scenes(category: Category, heldout: bool, n: int, seed: int = 0) -> list[tuple[Prompt, Scene]]:
    """The prompts of `make_prompts`, each with a scene that meets it."""
    rng = np.random.default_rng((seed, (*CATEGORIES, "mixed").index(category), heldout))
    found: dict[str, tuple[Prompt, Scene]] = {}
    for _ in range(_ATTEMPTS):
        if len(found) == n:
            return list(found.values())
        scene = sample_scene(rng, "heldout" if heldout else "seen", _PROMPTS, category)
        text = caption(scene, rng)
        found.setdefault(text, (Prompt(text, requirement(scene), category, heldout), scene))
    raise ValueError(f"only {len(found)} different {category} prompts were found, and {n} are wanted")
