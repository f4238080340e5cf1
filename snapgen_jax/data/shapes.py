"""The shapes world: what a scene is, and how it is drawn. A scene is plain data, its picture a pure function of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

Category = Literal["single_object", "two_objects", "counting", "colours", "position", "binding", "mixed"]
Relation = Literal["left of", "right of", "above", "below"]
SizeWord = Literal["small", "large"]

KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
UNSEEN_KINDS = ("moon",)  # can be drawn, and stand in no scene of training: for what is learnt later, from a few images
# No colour is a mixture of another with the light background, so that anti-aliased edges stay unambiguous.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "orange": (245, 130, 15),
    "yellow": (250, 225, 40),
    "green": (25, 150, 50),
    "cyan": (30, 195, 215),
    "blue": (35, 60, 215),
    "purple": (140, 40, 165),
    "black": (20, 20, 20),
}
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
BACKGROUND = 240  # grey level


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One drawn object.

    Attributes:
        kind: one of `KINDS` or of `UNSEEN_KINDS`.
        colour: a key of `COLOURS`.
        size: width of its box, as a fraction of the picture.
        x: centre, 0 at the left edge and 1 at the right.
        y: centre, 0 at the top edge and 1 at the bottom.
    """

    kind: str
    colour: str
    size: float
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Group:
    """What a caption says of a set of like objects.

    Attributes:
        kind: one of `KINDS`.
        count: how many, 1 to 4.
        colour: the colour that the caption names, or None where it names none.
        size: the size word of the caption, or None.
    """

    kind: str
    count: int = 1
    colour: str | None = None
    size: SizeWord | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and what can be said of it.

    Attributes:
        objects: everything drawn, in the order of `groups`; boxes never overlap.
        groups: what a caption says; `sum(count) == len(objects)`.
        category: the compositional skill that its caption tests.
        relation: where every object of `groups[0]` lies as seen from those of `groups[1]`, where the caption says so.
        background: grey level, 0 to 255.
    """

    objects: tuple[SceneObject, ...]
    groups: tuple[Group, ...]
    category: Category
    relation: Relation | None = None
    background: int = BACKGROUND


def holds(relation: Relation, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether the centre `a` (x, y) stands in `relation` to the centre `b`: "a left of b".

    True within 60 degrees of the axis, so a diagonal counts both ways (as in GenEval, arXiv:2310.11513, section 3).
    """
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return along > 0.5 * math.hypot(dx, dy)


# --- drawing ---------------------------------------------------------------------------------------------------------
# Each kind is a signed distance to its outline, negative inside, in units of half the object's size; u points right
# `[1, W]` and v points down `[H, 1]`.


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 1.0


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - 0.76) - 0.24


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.9


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Apex (0, -1), base corners (+-1, 0.8).
    slant = (1.8 * np.abs(u) - v - 1.0) / math.hypot(1.8, 1.0)
    return np.maximum(slant, v - 0.8)


_STAR_FOLD = 2 * math.pi / 5
_STAR_INNER = 0.46
# Outward normal of the edge from the tip (1, 0) to the inner corner, after folding the plane onto one half arm.
_STAR_EDGE = (1.0 - _STAR_INNER * math.cos(math.pi / 5), _STAR_INNER * math.sin(math.pi / 5))
_STAR_NORMAL = (_STAR_EDGE[1] / math.hypot(*_STAR_EDGE), _STAR_EDGE[0] / math.hypot(*_STAR_EDGE))


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = np.sqrt(u * u + v * v)
    angle = np.arctan2(u, -v) / _STAR_FOLD  # 0 at the tip that points up
    angle = np.abs(angle - np.rint(angle)) * _STAR_FOLD
    return _STAR_NORMAL[0] * (radius * np.cos(angle) - 1.0) + _STAR_NORMAL[1] * radius * np.sin(angle)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - 0.32, np.maximum(u, v) - 1.0)


def _moon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A crescent that opens upwards: a disc without another one that lies higher.
    bite = np.sqrt(u * u + (v + 0.62) ** 2) - 0.8
    return np.maximum(np.sqrt(u * u + v * v) - 1.0, -bite)


_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "moon": _moon,
}
_PAINT = {name: np.asarray(rgb, np.float32) for name, rgb in COLOURS.items()}


@functools.lru_cache(maxsize=16)
def _pixel_centres(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float32) + np.float32(0.5)


def render(scene: Scene, size: int) -> np.ndarray:
    """Draws a scene: uint8 `[size, size, 3]`, anti-aliased by the distance of each pixel centre to the outline."""
    canvas = np.full((size, size, 3), scene.background, np.float32)
    centres = _pixel_centres(size)
    for item in scene.objects:
        half = 0.5 * item.size * size
        x, y = item.x * size, item.y * size
        left, right = max(0, int(x - half - 1)), min(size, int(x + half + 2))
        top, bottom = max(0, int(y - half - 1)), min(size, int(y + half + 2))
        u = (centres[None, left:right] - x) / half
        v = (centres[top:bottom, None] - y) / half
        distance = half * _OUTLINES[item.kind](u, v)  # in pixels
        coverage = np.minimum(np.maximum(0.5 - distance, 0.0), 1.0)  # np.clip takes three times as long on a small box
        box = canvas[top:bottom, left:right]
        box += coverage[..., None] * (_PAINT[item.colour] - box)
    return (canvas + 0.5).astype(np.uint8)
