"""The detector on trial: pictures whose objects are known, and pictures made to deceive it."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import ndimage

from snapgen_jax.data.prompts import CATEGORIES, requirement
from snapgen_jax.data.shapes import COLOURS, KINDS, Scene, render
from snapgen_jax.data.shapes_grammar import ShapesConfig, sample_scene
from snapgen_jax.evaluation.detector import detect

BLUR = 0.08  # of the picture's side: over a quarter of the width of a small object


def chance(size: int, per_category: int = 64) -> float:
    """What a model would score that draws perfect pictures of the right category and ignores the prompt.

    The captions of true renders are exchanged for those of other renders of their category, in every possible way, and
    the passes averaged over pairs and then over categories.
    """
    shares = []
    for category in CATEGORIES:
        scenes = _scenes(category, per_category)
        asked = [requirement(scene) for scene in scenes]
        shown = [detect(render(scene, size)) for scene in scenes]
        met = np.array([[demand.met_by(objects) for objects in shown] for demand in asked])
        shares.append(met[~np.eye(per_category, dtype=bool)].mean())
    return float(np.mean(shares))


@functools.lru_cache(maxsize=8)
def validate_detector(size: int, per_category: int = 64) -> Mapping[str, float]:
    """Measures the detector on renders of `size` pixels, half of which show held-out combinations; once in a process.

    Returns:
        detector.accuracy: share of true renders that meet their own caption; `detector.accuracy.<category>` of each.
        detector.chance: share that meets the caption of another render of the category, see `chance`.
        detector.accepts.<adversary>: share of deceiving pictures that meet the caption, which should be 0:
            wrong_shape (every kind exchanged), wrong_colours (every colour exchanged), swapped_colours (the colours of
            the two objects exchanged), surplus (one object more), blurred (past recognition), merged (equal colours,
            pushed together into one blob).
    """
    numbers: dict[str, float] = {}
    for category in CATEGORIES:
        scenes = _scenes(category, per_category)
        numbers[f"detector.accuracy.{category}"] = _accepted(scenes, [render(scene, size) for scene in scenes])
    accuracies = list(numbers.values())
    numbers = {
        "detector.accuracy": float(np.mean(accuracies)),
        **numbers,
        "detector.chance": chance(size, per_category),
    }
    for name, (categories, deceive) in _ADVERSARIES.items():
        scenes = [scene for category in categories for scene in _scenes(category, per_category)]
        numbers[f"detector.accepts.{name}"] = _accepted(scenes, [deceive(scene, size) for scene in scenes])
    return types.MappingProxyType(numbers)


def _accepted(scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> float:
    """Share of pictures that meet what the caption of their scene demands."""
    pairs = zip(scenes, pictures, strict=True)
    return float(np.mean([requirement(scene).met_by(detect(picture)) for scene, picture in pairs]))


@functools.lru_cache(maxsize=32)
def _scenes(category: str, count: int) -> tuple[Scene, ...]:
    rng = np.random.default_rng((count, CATEGORIES.index(category)))  # type: ignore[arg-type]
    config = ShapesConfig(relation_colours=0.0)  # as the prompts of the score
    return tuple(sample_scene(rng, ("seen", "heldout")[i % 2], config, category) for i in range(count))  # type: ignore[arg-type]


# --- adversaries -----------------------------------------------------------------------------------------------------


def _repaint(scene: Scene, kind_step: int = 0, colour_step: int = 0) -> Scene:
    """The scene with kinds and colours moved on in their lists."""
    colours = list(COLOURS)

    def moved(words: Sequence[str], word: str, step: int) -> str:
        return words[(words.index(word) + step) % len(words)]

    objects = [
        dataclasses.replace(o, kind=moved(KINDS, o.kind, kind_step), colour=moved(colours, o.colour, colour_step))
        for o in scene.objects
    ]
    return dataclasses.replace(scene, objects=tuple(objects))


def _wrong_shape(scene: Scene, size: int) -> np.ndarray:
    return render(_repaint(scene, kind_step=1), size)


def _wrong_colours(scene: Scene, size: int) -> np.ndarray:
    return render(_repaint(scene, colour_step=3), size)


def _swapped_colours(scene: Scene, size: int) -> np.ndarray:
    first, second = scene.objects
    swapped = (dataclasses.replace(first, colour=second.colour), dataclasses.replace(second, colour=first.colour))
    return render(dataclasses.replace(scene, objects=swapped), size)


def _surplus(scene: Scene, size: int) -> np.ndarray:
    """A second picture of the object beside a smaller first."""
    (only,) = scene.objects
    pair = tuple(dataclasses.replace(only, size=0.36, x=x) for x in (0.27, 0.73))
    return render(dataclasses.replace(scene, objects=pair), size)


def _blurred(scene: Scene, size: int) -> np.ndarray:
    sigma = BLUR * size
    soft = ndimage.gaussian_filter(render(scene, size).astype(np.float32), (sigma, sigma, 0), mode="nearest")
    return (soft + 0.5).astype(np.uint8)


def _merged(scene: Scene, size: int) -> np.ndarray:
    colour = scene.objects[0].colour
    together = [
        dataclasses.replace(o, colour=colour, x=0.5 + 0.25 * (o.x - 0.5), y=0.5 + 0.25 * (o.y - 0.5))
        for o in scene.objects
    ]
    return render(dataclasses.replace(scene, objects=tuple(together)), size)


_ADVERSARIES: dict[str, tuple[tuple[str, ...], Callable[[Scene, int], np.ndarray]]] = {
    "wrong_shape": (CATEGORIES, _wrong_shape),
    "wrong_colours": (("colours", "binding"), _wrong_colours),
    "swapped_colours": (("binding",), _swapped_colours),
    "surplus": (("single_object", "colours"), _surplus),
    "blurred": (CATEGORIES, _blurred),
    "merged": (("two_objects", "counting"), _merged),
}
