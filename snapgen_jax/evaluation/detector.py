"""Finds the objects of the shapes world in an image. It reads pixels and knows the kinds and colours, nothing else.

Analysis by synthesis: the background is estimated, what differs from it is cut into components, the soft mask of each
component is compared with every kind drawn at its own centre and area, and a component that no drawing explains is an
`unknown` object. Mild noise and blur are tolerated; a mask whose edges are blurred beyond recognition is unknown too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from scipy import ndimage

from snapgen_jax.data.shapes import COLOURS, KINDS, Scene, SceneObject, render

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class DetectedObject(SceneObject):
    """One object found in an image; `kind` and `colour` may be `UNKNOWN`. Lengths are fractions of the image's side.

    An unknown object is placed at its centre of mass, and its size is that of a square of the same area.

    Attributes:
        area: soft area of the mask, as a fraction of the image's.
        fit: intersection over union of the mask with the best drawing, 0 to 1.
    """

    area: float
    fit: float


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Thresholds. `validate_detector` measures that they accept true renders and refuse the adversaries.

    Attributes:
        kinds: those that are recognised. All else is unknown.
        foreground: a pixel belongs to an object from this share of the contrast of its nearest colour on.
        faint: a component that reaches this share and never `foreground` is a faint object, of unknown kind.
        speck_area: smaller components are noise.
        faint_area: smaller faint components are noise.
        least_size: objects smaller than this are of unknown kind (the smallest drawn ones measure 0.28).
        least_fit: intersection over union below which a kind is not recognised. Round and full kinds must fit better:
            noise costs them less, and more of what is no kind at all resembles them.
        least_lead: by how much the best kind must fit better than the second.
        most_blur: standard deviation of the edge blur, relative to the object's size, from which no kind is recognised.
        colour_distance: RGB distance beyond which a colour has no name.
        least_purity: share of an object's pixels that must lie within `colour_distance` of its own colour.
    """

    kinds: Sequence[str] = KINDS
    foreground: float = 0.5
    faint: float = 0.3
    speck_area: float = 0.006
    faint_area: float = 0.015
    least_size: float = 0.2
    least_fit: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {
            "circle": 0.90,
            "square": 0.88,
            "triangle": 0.85,
            "star": 0.80,
            "ring": 0.75,
            "cross": 0.82,
            "moon": 0.80,
        }
    )
    least_lead: float = 0.02
    most_blur: float = 0.08
    colour_distance: float = 75.0
    least_purity: float = 0.7


DEFAULT = DetectorConfig()
_NAMES = tuple(COLOURS)
_PALETTE = np.asarray(list(COLOURS.values()), np.float32)  # [K, 3]


def detect(image: np.ndarray, config: DetectorConfig = DEFAULT) -> list[DetectedObject]:
    """The objects in `uint8 [S, S, 3]`, largest first.

    Raises:
        ValueError: not a square RGB image of bytes.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"the detector reads uint8 [S, S, 3] and got {image.dtype} {list(image.shape)}")
    image = _reduced(image)
    size = image.shape[0]
    ground = background(image)
    offset = image.astype(np.float32) - ground
    contrast = _contrast(offset, ground)
    found = []
    for mask in _components(contrast > config.foreground, config.speck_area * size * size):
        whole = _recognise(offset, mask, ground, config)
        # What is no kind as a whole may be objects of different colours that touch.
        zones = _split_by_colour(offset, mask, ground, config) if whole.kind == UNKNOWN else []
        found += [_recognise(offset, zone, ground, config) for zone in zones] or [whole]
    found += _faint(contrast, config)
    return sorted(found, key=lambda item: -item.area)


def _reduced(image: np.ndarray) -> np.ndarray:
    """A large image averaged over whole squares of pixels, to 64 pixels or somewhat more: kinds need no finer ones."""
    side = image.shape[0]
    factor = max((f for f in range(1, side // 64 + 1) if side % f == 0), default=1)
    if factor == 1:
        return image
    squares = image.reshape(side // factor, factor, side // factor, factor, 3)
    return (squares.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def background(image: np.ndarray) -> np.ndarray:
    """RGB of the background, float32 `[3]`: the median of the pixels along the border, where objects do not reach."""
    width = max(1, image.shape[0] // 32)
    inner = np.zeros(image.shape[:2], bool)
    inner[width:-width, width:-width] = True
    return np.median(image[~inner], axis=0).astype(np.float32)


def _contrast(offset: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Length `[S, S]` of each pixel's offset from the background, relative to that of the colour it points at.

    Anti-aliased edges lie on the line between background and colour, so that a contrast of 0.5 is the outline.
    """
    lines = _PALETTE - ground
    lengths = np.linalg.norm(lines, axis=1)
    nearest = (offset @ (lines / np.maximum(lengths, 1.0)[:, None]).T).argmax(-1)
    # A generated background may come close to a colour, and then a small difference must not count as full contrast.
    return np.linalg.norm(offset, axis=-1) / np.maximum(lengths, 80.0)[nearest]


def _components(mask: np.ndarray, least_area: float) -> list[np.ndarray]:
    """Connected components as zones: each also takes the pixels around it that lie nearer to it than to the others."""
    labels = _label(mask)
    kept = [number for number, area in enumerate(np.bincount(labels.ravel())) if number and area >= least_area]
    if not kept:
        return []
    labels = np.where(np.isin(labels, kept), labels, 0)
    distance, nearest = _nearest(labels > 0)
    zones = np.where(distance <= mask.shape[0] / 16, labels[nearest], 0)
    return [zones == number for number in kept]


def _label(mask: np.ndarray) -> np.ndarray:
    """Numbers the connected components from 1 on. Of four neighbours: diagonal contact is not contact."""
    labels, _ = cast(tuple[np.ndarray, int], ndimage.label(mask))
    return labels


def _nearest(mask: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """For each pixel the distance to the nearest pixel of the mask, and that pixel's indices."""
    found = ndimage.distance_transform_edt(~mask, return_indices=True)
    distance, indices = cast(tuple[np.ndarray, np.ndarray], found)
    return distance, tuple(indices)


def _centre(mask: np.ndarray) -> tuple[float, float]:
    """Centre of mass (x, y) in pixels from the corner of the image."""
    total = max(float(mask.sum()), 1e-6)
    along = np.arange(mask.shape[0]) + 0.5
    return float(mask.sum(axis=0) @ along) / total, float(mask.sum(axis=1) @ along) / total


def _own_colour(offset: np.ndarray, zone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median offset `[3]` of the pixels that an object covers fully, and those pixels' offsets `[N, 3]`."""
    pixels = offset[zone]
    strength = np.linalg.norm(pixels, axis=1)
    core = pixels[strength >= 0.75 * np.percentile(strength, 95)]
    return np.median(core, axis=0), core


def _recognise(offset: np.ndarray, zone: np.ndarray, ground: np.ndarray, config: DetectorConfig) -> DetectedObject:
    side = zone.shape[0]
    direction, core = _own_colour(offset, zone)
    # Coverage in the object's own colour, so that a pale red is still a full mask.
    coverage = np.clip(offset @ direction / max(float(direction @ direction), 1.0), 0.0, 1.0) * zone
    area = max(float(coverage.sum()), 1.0)
    centre = _centre(coverage)
    mask = _sharpen(coverage)
    fits = {kind: _fit(mask, kind, area, centre) for kind in config.kinds}
    ranking = sorted(config.kinds, key=lambda kind: fits[kind][0], reverse=True)
    fit, size, (x, y), drawing = fits[ranking[0]]
    recognised = (
        fit >= config.least_fit[ranking[0]]
        and fit - fits[ranking[1]][0] >= config.least_lead
        and size >= config.least_size * side
        and _edge_blur(mask, drawing) <= config.most_blur * size
    )
    if not recognised:
        size, (x, y) = math.sqrt(area), centre
    return DetectedObject(
        kind=ranking[0] if recognised else UNKNOWN,
        colour=_name_colour(direction, core, ground, config),
        size=size / side,
        x=x / side,
        y=y / side,
        area=area / side**2,
        fit=fit,
    )


def _fit(
    mask: np.ndarray, kind: str, area: float, centre: tuple[float, float]
) -> tuple[float, float, tuple[float, float], np.ndarray]:
    """How well a kind of the same area and centre of mass explains a mask: (overlap, size, (x, y), drawing)."""
    filled, drop = _shape_moments(kind)
    side = mask.shape[0]
    size = math.sqrt(area / filled)
    x, y = centre[0], centre[1] - drop * size
    drawing = _draw(kind, size / side, x / side, y / side, side)
    drawn = _sharpen(drawing)
    overlap = np.minimum(mask, drawn).sum() / max(float(np.maximum(mask, drawn).sum()), 1e-6)
    return float(overlap), size, (x, y), drawing


def _draw(kind: str, size: float, x: float, y: float, side: int) -> np.ndarray:
    """Coverage `[side, side]`, 0 to 1, of one object."""
    picture = render(Scene((SceneObject(kind, "black", size, x, y),), (), "single_object", background=255), side)
    dark = COLOURS["black"][0]
    return (255.0 - picture[..., 0].astype(np.float32)) / (255.0 - dark)


@functools.cache
def _shape_moments(kind: str) -> tuple[float, float]:
    """Area, and how far the centre of mass lies below the centre, relative to a box of width 1."""
    side, size = 256, 0.875
    drawing = _draw(kind, size, 0.5, 0.5, side)
    below = _centre(drawing)[1] - side / 2
    return float(drawing.sum()) / (size * side) ** 2, below / (size * side)


def _sharpen(coverage: np.ndarray) -> np.ndarray:
    """Stretches the middle of the range, so that faint noise inside and outside of an object does not count."""
    return np.clip((coverage - 0.2) / 0.6, 0.0, 1.0)


# Along a pixel of outline, s (1 - s) of the sharpened coverage s sums to at most 0.25 if the outline is drawn sharp
# (where it passes through pixel centres), and to 0.267 sigma if it is blurred by sigma pixels.
_DRAWN, _BLURRED = 0.25, 0.267


def _edge_blur(mask: np.ndarray, drawing: np.ndarray) -> float:
    """Standard deviation, in pixels, of the blur of a sharpened mask with an outline as long as that of the drawing."""
    down, right = np.diff(drawing, axis=0, append=0.0), np.diff(drawing, axis=1, append=0.0)
    outline = float(np.hypot(down, right).sum())
    softness = float((mask * (1 - mask)).sum()) / max(outline, 1.0)
    return math.sqrt(max(softness**2 - _DRAWN**2, 0.0)) / _BLURRED


def _name_colour(direction: np.ndarray, core: np.ndarray, ground: np.ndarray, config: DetectorConfig) -> str:
    distance = np.linalg.norm(_PALETTE - ground - direction, axis=1)
    purity = np.mean(np.linalg.norm(core - direction, axis=1) <= config.colour_distance)
    nearest = int(distance.argmin())
    named = distance[nearest] <= config.colour_distance and purity >= config.least_purity
    return _NAMES[nearest] if named else UNKNOWN


def _split_by_colour(
    offset: np.ndarray, zone: np.ndarray, ground: np.ndarray, config: DetectorConfig
) -> list[np.ndarray]:
    """Cuts a zone where colours meet: a zone for each connected part of one colour; none if there is but one colour."""
    strength = np.linalg.norm(offset, axis=-1)
    core = zone & (strength >= 0.75 * np.percentile(strength[zone], 95))
    nearest = np.linalg.norm(offset[..., None, :] - (_PALETTE - ground), axis=-1).argmin(-1)
    present = [k for k in range(len(_PALETTE)) if np.mean(nearest[core] == k) >= 0.12]
    if len(present) < 2:
        return []
    core &= np.isin(nearest, present)
    colours = nearest[_nearest(core)[1]]
    parts = []
    for colour in present:
        labels = _label(zone & (colours == colour))
        parts += [labels == number for number in range(1, labels.max() + 1)]
    return [part for part in parts if (part & core).sum() >= config.speck_area * zone.size]


def _faint(contrast: np.ndarray, config: DetectorConfig) -> list[DetectedObject]:
    """Visible components that never become clear: an image with a ghost in it does not show just what was asked for."""
    labels = _label(contrast > config.faint)
    found = []
    for number in range(1, labels.max() + 1):
        mask = labels == number
        area = float(mask.mean())
        if area >= config.faint_area and contrast[mask].max() <= config.foreground:
            x, y = (place / mask.shape[0] for place in _centre(mask))
            found.append(DetectedObject(UNKNOWN, UNKNOWN, math.sqrt(area), x, y, area, 0.0))
    return found
