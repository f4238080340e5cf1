"""Which scenes there are and what is said of them: combinations held out, scenes drawn from a generator, captions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from snapgen_jax.data.shapes import (
    BACKGROUND,
    COLOURS,
    KINDS,
    OPPOSITE,
    RELATIONS,
    Category,
    Group,
    Relation,
    Scene,
    SceneObject,
    SizeWord,
    holds,
)

T = TypeVar("T")
Combinations = Literal["seen", "heldout"]
Words = tuple[tuple[Group, ...], Relation | None]  # what a caption says

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
MIN_SIZE = 0.28  # nine pixels at 32: every kind is still recognisable
MAX_SIZE = {1: 0.60, 2: 0.46, 3: 0.42, 4: 0.38}  # by the number of objects
SIZE_RANGES: dict[SizeWord, tuple[float, float]] = {"small": (MIN_SIZE, 0.36), "large": (0.50, 0.60)}
GAP = 0.05  # between boxes, as a fraction of the picture


@dataclasses.dataclass(frozen=True)
class CategoryShares:
    """How often each category is drawn in training. Relative weights, need not sum to one."""

    single_object: float = 0.10
    two_objects: float = 0.12
    counting: float = 0.16
    colours: float = 0.10
    position: float = 0.24
    binding: float = 0.14
    mixed: float = 0.14


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """The shapes data set.

    Attributes:
        size: side of the rendered picture in pixels, 32 to 256.
        train_examples: scenes in an epoch; each is rendered from its index, so the number costs nothing.
        validation_examples: scenes of the validation split, drawn from another seed stream.
        background: grey level.
        shares: how often each category is drawn.
        relation_colours: share of the position scenes whose caption names colours too.
    """

    size: int = 32
    train_examples: int = 1 << 24
    validation_examples: int = 4096
    background: int = BACKGROUND
    shares: CategoryShares = CategoryShares()
    relation_colours: float = 0.5


# --- combinations held out of training -------------------------------------------------------------------------------
# Fixed by position in the lists above. Every kind, colour, number and relation is seen, and each kind is seen with most
# colours, numbers and partners; only these combinations never are.


def heldout_colour(colour: str, kind: str) -> bool:
    """One kind a colour: 8 of 48 pairs."""
    return (list(COLOURS).index(colour) + KINDS.index(kind)) % len(KINDS) == 0


def heldout_pair(a: str, b: str) -> bool:
    """One partner a kind: 3 of 15 unordered pairs of different kinds."""
    return abs(KINDS.index(a) - KINDS.index(b)) == len(KINDS) // 2


def heldout_number(count: int, kind: str) -> bool:
    """One of the numbers two to four a kind: 6 of 18."""
    return count == 2 + KINDS.index(kind) % 3


def heldout_size(size: SizeWord, kind: str) -> bool:
    """One size word a kind: 6 of 12. Held out where an object is alone: elsewhere all objects are small."""
    return size == ("small", "large")[KINDS.index(kind) % 2]


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


# --- drawing a scene -------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _kinds(rng: np.random.Generator, count: int) -> list[str]:
    return [KINDS[i] for i in rng.permutation(len(KINDS))[:count]]


def _colours(rng: np.random.Generator, count: int) -> list[str]:
    names = list(COLOURS)
    return [names[i] for i in rng.permutation(len(names))[:count]]


def _compose(
    rng: np.random.Generator, category: Category, config: ShapesConfig
) -> tuple[tuple[Group, ...], Relation | None]:
    """What the caption will say: groups, and the relation of the first to the second."""
    match category:
        case "single_object":
            return (Group(_pick(rng, KINDS), size=_pick(rng, (None, None, "small", "large"))),), None
        case "colours":
            return (Group(_pick(rng, KINDS), colour=_pick(rng, tuple(COLOURS))),), None
        case "counting":
            return (Group(_pick(rng, KINDS), _pick(rng, (2, 3, 4))),), None
        case "two_objects":
            return tuple(Group(kind) for kind in _kinds(rng, 2)), None
        case "binding":
            return tuple(map(_coloured, _kinds(rng, 2), (1, 1), _colours(rng, 2))), None
        case "position":
            kinds, relation = _kinds(rng, 2), _pick(rng, RELATIONS)
            if rng.random() < config.relation_colours:
                return tuple(map(_coloured, kinds, (1, 1), _colours(rng, 2))), relation
            return tuple(Group(kind) for kind in kinds), relation
        case "mixed":
            return _compose_mixed(rng)
        case _:
            raise ValueError(f"unknown category {category!r}")


def _coloured(kind: str, count: int, colour: str) -> Group:
    return Group(kind, count, colour)


def _compose_mixed(rng: np.random.Generator) -> Words:
    match _pick(rng, ("coloured number", "numbers", "relation", "relation", "list")):
        case "coloured number":  # "three red squares"
            return (Group(_pick(rng, KINDS), _pick(rng, (2, 3, 4)), _pick(rng, tuple(COLOURS))),), None
        case "numbers":  # "two circles and a star"
            return tuple(map(Group, _kinds(rng, 2), _pick(rng, ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))))), None
        case "relation":  # "two red circles left of a blue square"
            counts = _pick(rng, ((1, 2), (2, 1), (2, 2)))
            return tuple(map(_coloured, _kinds(rng, 2), counts, _colours(rng, 2))), _pick(rng, RELATIONS)
        case _:  # "a red circle, a blue square and a green star"
            return tuple(map(_coloured, _kinds(rng, 3), (1, 1, 1), _colours(rng, 3))), None


Rectangle = tuple[float, float, float, float]  # left, top, width, height
_CELL = MIN_SIZE + GAP


def _cut(rng: np.random.Generator, area: Rectangle, across: bool) -> tuple[Rectangle, Rectangle]:
    """Cuts an area into left and right (`across`) or top and bottom parts, each wide enough for an object."""
    left, top, width, height = area
    length = width if across else height
    first = _CELL + rng.random() * (length - 2 * _CELL)
    if across:
        return (left, top, first, height), (left + first, top, width - first, height)
    return (left, top, width, first), (left, top + first, width, height - first)


def _areas(rng: np.random.Generator, area: Rectangle, count: int) -> list[Rectangle]:
    """Splits an area into `count` parts by random straight cuts. Any two boxes that do not overlap can be parted so."""
    if count == 1:
        return [area]
    _, _, width, height = area
    across = rng.random() < 0.5 if min(width, height) >= 2 * _CELL else width > height
    first, second = _cut(rng, area, across)
    few = count // 2
    if rng.random() < 0.5:
        return _areas(rng, first, few) + _areas(rng, second, count - few)
    return _areas(rng, first, count - few) + _areas(rng, second, few)


_PICTURE: Rectangle = (0.0, 0.0, 1.0, 1.0)


def _layout(rng: np.random.Generator, groups: Sequence[Group], relation: Relation | None) -> list[Rectangle]:
    """One area an object, in the order of the groups; areas of related groups lie on either side of one cut."""
    if relation is None:
        areas = _areas(rng, _PICTURE, sum(g.count for g in groups))
        return [areas[i] for i in rng.permutation(len(areas))]
    parts = _cut(rng, _PICTURE, relation in ("left of", "right of"))
    if relation in ("right of", "below"):
        parts = parts[::-1]
    return [area for group, part in zip(groups, parts, strict=True) for area in _areas(rng, part, group.count)]


def _place(
    rng: np.random.Generator, area: Rectangle, sizes: tuple[float, float], kind: str, colour: str
) -> SceneObject:
    left, top, width, height = area
    low, high = sizes
    size = low + rng.random() * (min(high, min(width, height) - GAP) - low)
    x = left + 0.5 * (size + GAP) + rng.random() * (width - size - GAP)
    y = top + 0.5 * (size + GAP) + rng.random() * (height - size - GAP)
    return SceneObject(kind, colour, size, x, y)


def _sizes(group: Group, total: int, combinations: Combinations) -> tuple[float, float]:
    if group.size is not None:
        return SIZE_RANGES[group.size]
    low, high = MIN_SIZE, MAX_SIZE[total]
    if total == 1 and combinations == "seen":  # an object alone is not drawn in its held-out size either
        if heldout_size("small", group.kind):
            low = SIZE_RANGES["small"][1]
        if heldout_size("large", group.kind):
            high = SIZE_RANGES["large"][0]
    return low, high


_NAMES = tuple(CategoryShares.__dataclass_fields__)
_ATTEMPTS = 1000


def sample_category(rng: np.random.Generator, shares: CategoryShares) -> Category:
    """Draws a category by its share."""
    point = rng.random() * sum(getattr(shares, name) for name in _NAMES)
    for name in _NAMES:
        point -= getattr(shares, name)
        if point < 0:
            return name  # type: ignore[return-value]
    return _NAMES[-1]  # type: ignore[return-value]


def sample_scene(
    rng: np.random.Generator,
    combinations: Combinations = "seen",
    config: ShapesConfig = ShapesConfig(),
    category: Category | None = None,
) -> Scene:
    """Draws a scene. "seen" scenes show no held-out combination; the caption of a "heldout" scene says at least one.

    Args:
        rng: the only source of randomness.
        combinations: which side of the hold-out.
        config: sizes and shares.
        category: what the caption is to test; None draws it by the config's shares.
    """
    if category is None:
        category = sample_category(rng, config.shares)
    for _ in range(_ATTEMPTS):
        groups, relation = _compose(rng, category, config)
        if said_heldout(groups, relation) != (combinations == "heldout"):
            continue
        for _ in range(8):  # other layouts of the same words
            scene = _draw(rng, groups, relation, category, combinations, config)
            if relation is not None and not _relation_is_clear(scene):
                continue
            if combinations == "heldout" or not is_heldout(scene):
                return scene
    raise RuntimeError(f"no {combinations} scene of category {category!r} in {_ATTEMPTS} attempts")


def said_heldout(groups: Sequence[Group], relation: Relation | None) -> bool:
    """Whether a caption says a held-out combination."""
    return (
        any(g.colour is not None and heldout_colour(g.colour, g.kind) for g in groups)
        or any(heldout_number(g.count, g.kind) for g in groups)
        or any(g.size is not None and heldout_size(g.size, g.kind) for g in groups)
        or any(heldout_pair(a.kind, b.kind) for a, b in itertools.combinations(groups, 2))
        or (relation is not None and heldout_relation(relation, groups[0].kind, groups[1].kind))
    )


def _draw(
    rng: np.random.Generator,
    groups: tuple[Group, ...],
    relation: Relation | None,
    category: Category,
    combinations: Combinations,
    config: ShapesConfig,
) -> Scene:
    total = sum(g.count for g in groups)
    areas = iter(_layout(rng, groups, relation))
    objects = []
    for group in groups:
        colour = group.colour or _pick(rng, [c for c in COLOURS if not heldout_colour(c, group.kind)])
        sizes = _sizes(group, total, combinations)
        objects += [_place(rng, next(areas), sizes, group.kind, colour) for _ in range(group.count)]
    return Scene(tuple(objects), groups, category, relation, config.background)


def _relation_is_clear(scene: Scene) -> bool:
    first, second = scene.objects[: scene.groups[0].count], scene.objects[scene.groups[0].count :]
    assert scene.relation is not None
    return all(holds(scene.relation, (a.x, a.y), (b.x, b.y)) for a in first for b in second)


# --- captions --------------------------------------------------------------------------------------------------------

_PLURALS = {"cross": "crosses"}
_ONE_GROUP = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "{} on a plain background",
    "there {be} {}",
)
_MANY_GROUPS = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "there {be} {}")
_TWO_GROUPS = ("{} and {}", "{} and {}", "{} with {}", "{} together with {}")
_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_RELATED = ("{a} {r} {b}", "{a} {r} {b}", "{a} {be} {r} {b}", "a photo of {a} {r} {b}", "a picture of {a} {r} {b}")


def phrase(group: Group) -> str:
    """A group as a noun phrase: "a star", "an orange circle", "two red crosses", "a small ring"."""
    words = [word for word in (group.size, group.colour) if word]
    if group.count > 1:
        words += [_PLURALS.get(group.kind, group.kind + "s")]
        return " ".join([NUMBERS[group.count], *words])
    words += [group.kind]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _verb(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Says a scene in one of several phrasings, drawn from `rng`."""
    nouns = [phrase(group) for group in scene.groups]
    first = scene.groups[0]
    if scene.relation is not None:
        words = _pick(rng, _PHRASES[scene.relation])
        return _pick(rng, _RELATED).format(a=nouns[0], b=nouns[1], r=words, be=_verb(first))
    if len(nouns) == 1:
        return _pick(rng, _ONE_GROUP).format(nouns[0], be=_verb(first))
    joined = _pick(rng, _TWO_GROUPS) if len(nouns) == 2 else ", ".join(["{}"] * (len(nouns) - 1)) + " and {}"
    return _pick(rng, _MANY_GROUPS).format(joined.format(*nouns), be=_verb(first))
