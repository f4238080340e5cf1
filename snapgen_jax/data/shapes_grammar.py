"""Which scenes there are: words drawn first, then a picture that shows exactly what they say."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from snapgen_jax.bounds import SHARE, at_least, check, within
from snapgen_jax.data.shapes import (
    BACKGROUND,
    COLOURS,
    KINDS,
    RELATIONS,
    Category,
    Group,
    Relation,
    Scene,
    SceneObject,
    SizeWord,
    holds,
)
from snapgen_jax.data.shapes_heldout import heldout_colour, heldout_size, is_heldout, said_heldout
from snapgen_jax.data.words import pick

Combinations = Literal["seen", "heldout"]
Words = tuple[tuple[Group, ...], Relation | None]  # what a caption says

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

    def __post_init__(self) -> None:
        shares = dataclasses.asdict(self)
        check(self, **dict.fromkeys(shares, at_least(0)))
        if not any(shares.values()):
            raise ValueError("no category has a share; give one of them at least a number above 0")


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """The shapes data set.

    Attributes:
        size: side of the rendered picture in pixels, 32 to 256.
        train_examples: scenes in an epoch; each is rendered from its index, so the number costs nothing.
        validation_examples: scenes of the validation split, drawn from another seed stream.
        background: grey level.
        shares: how often each category is drawn.
        captions: sentences, or the whole truth about every object, to tell what a model's words cost it.
        dense_share: share of the scenes of one or two objects whose caption says the colour and the place of each; more
            objects would make longer captions.
        relation_colours: share of the position scenes whose caption names colours too.
    """

    size: int = 32
    train_examples: int = 1 << 24
    validation_examples: int = 4096
    background: int = BACKGROUND
    shares: CategoryShares = dataclasses.field(default_factory=CategoryShares)
    relation_colours: float = 0.5
    captions: Literal["phrases", "layout"] = "phrases"
    dense_share: float = 0.0

    def __post_init__(self) -> None:
        check(self, size=within(32, 256), train_examples=at_least(1), validation_examples=at_least(1))
        check(self, background=within(0, 255), relation_colours=SHARE, dense_share=SHARE)


# --- drawing a scene -------------------------------------------------------------------------------------------------


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
            return (Group(pick(rng, KINDS), size=pick(rng, (None, None, "small", "large"))),), None
        case "colours":
            return (Group(pick(rng, KINDS), colour=pick(rng, tuple(COLOURS))),), None
        case "counting":
            return (Group(pick(rng, KINDS), pick(rng, (2, 3, 4))),), None
        case "two_objects":
            return tuple(Group(kind) for kind in _kinds(rng, 2)), None
        case "binding":
            return tuple(map(_coloured, _kinds(rng, 2), (1, 1), _colours(rng, 2))), None
        case "position":
            kinds, relation = _kinds(rng, 2), pick(rng, RELATIONS)
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
    match pick(rng, ("coloured number", "numbers", "relation", "relation", "list")):
        case "coloured number":  # "three red squares"
            return (Group(pick(rng, KINDS), pick(rng, (2, 3, 4)), pick(rng, tuple(COLOURS))),), None
        case "numbers":  # "two circles and a star"
            return tuple(map(Group, _kinds(rng, 2), pick(rng, ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))))), None
        case "relation":  # "two red circles left of a blue square"
            counts = pick(rng, ((1, 2), (2, 1), (2, 2)))
            return tuple(map(_coloured, _kinds(rng, 2), counts, _colours(rng, 2))), pick(rng, RELATIONS)
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


@functools.cache
def _seen_colours(kind: str) -> tuple[str, ...]:
    return tuple(colour for colour in COLOURS if not heldout_colour(colour, kind))


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
        colour = group.colour or pick(rng, _seen_colours(group.kind))
        sizes = _sizes(group, total, combinations)
        objects += [_place(rng, next(areas), sizes, group.kind, colour) for _ in range(group.count)]
    return Scene(tuple(objects), groups, category, relation, config.background)


def _relation_is_clear(scene: Scene) -> bool:
    first, second = scene.objects[: scene.groups[0].count], scene.objects[scene.groups[0].count :]
    assert scene.relation is not None
    return all(holds(scene.relation, (a.x, a.y), (b.x, b.y)) for a in first for b in second)
