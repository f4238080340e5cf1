"""Scenes beside a caption that is false of them in one fact, for a network that compares images with texts.

Another scene's caption is false in most words, and telling the two apart teaches little of places and of what belongs
to what (Yuksekgonul et al. 2023, arXiv 2210.01936). Here a true caption and a false one differ in one fact:

| change | the false caption |
|---|---|
| `colour` | names another colour |
| `kind` | names another kind |
| `number` | names another number |
| `position` | puts an object elsewhere, or each of two where the other is |
| `binding` | gives each of two objects the colour of the other |
| `objects` | leaves out an object that is there, or names one that is not |

Neither caption says a held-out combination, so that such words alone do not betray the false one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from snapgen_jax.data.arrays import LABEL, TEXT, ArraySpec, Example
from snapgen_jax.data.config import SourceConfig, Split
from snapgen_jax.data.prompts import requirement
from snapgen_jax.data.shapes import COLOURS, KINDS, RELATIONS, Group, Scene, SceneObject
from snapgen_jax.data.shapes_captions import caption, place
from snapgen_jax.data.shapes_grammar import MIN_SIZE, ShapesConfig
from snapgen_jax.data.shapes_heldout import is_heldout, said_heldout
from snapgen_jax.data.shapes_source import ShapesSource
from snapgen_jax.data.sources import asked
from snapgen_jax.data.words import pick

# How often a change is drawn where several fit: most often what is learnt last.
WEIGHTS = {"colour": 1.0, "kind": 1.0, "number": 2.0, "position": 3.0, "binding": 2.0, "objects": 1.0}
CHANGES = tuple(WEIGHTS)
MOST_OBJECTS = 4  # that a caption names
_ATTEMPTS, _DRAWS = 50, 8

Change = Callable[[Scene, np.random.Generator], Scene | None]


class ShapesChanges:
    """The scenes and captions of `ShapesSource`, draw by draw, and a false caption beside each."""

    held_out = True  # no training scene is a validation scene

    def __init__(self, config: ShapesConfig, split: Split):
        self._scenes = ShapesSource(config, split)

    def __len__(self) -> int:
        return len(self._scenes)

    def spec(self) -> dict[str, ArraySpec]:
        """Image and caption, the false caption, which of `CHANGES` makes it false, and the objects of the scene: kind
        and colour, numbered from 1 in the order of `shapes` and 0 for none, and the places of their centres."""
        return {
            **self._scenes.spec(),
            "other_caption": TEXT,
            "changed": LABEL,
            "objects": ArraySpec("array", (MOST_OBJECTS, 2), np.int32, "same"),
            "places": ArraySpec("points", (MOST_OBJECTS, 2), np.float32, "negate_x"),
        }

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The rendered scene `[size, size, 3]`, one of its phrasings, a false one, and the number of its change."""
        apart = rng.spawn(1)[0]  # so that the caption, and the crop after it, are those of the scenes alone
        scene = self._scenes.scene(index)
        write = self._scenes.writer(scene, rng)
        name, false = changed(scene, apart, "words" if write is caption else "objects")
        return {
            **self._scenes.picture(scene, names),
            "caption": write(scene, rng),
            "other_caption": write(false, apart),
            "changed": np.int32(CHANGES.index(name)),
            **(_listed(scene) if asked("objects", names) else {}),
        }

    def name(self, index: int) -> str:
        """ "shapes scene 7"."""
        return self._scenes.name(index)

    def sizes(self) -> None:
        """None: a scene goes to any bucket."""

    def buckets(self) -> None:
        """None."""


def _listed(scene: Scene) -> Example:
    """The objects of a scene as arrays, see `ShapesChanges.spec`."""
    objects, places = np.zeros((MOST_OBJECTS, 2), np.int32), np.zeros((MOST_OBJECTS, 2), np.float32)
    for row, item in enumerate(scene.objects):
        objects[row] = 1 + KINDS.index(item.kind), 1 + tuple(COLOURS).index(item.colour)
        places[row] = 2 * item.x - 1, 2 * item.y - 1
    return {"objects": objects, "places": places}


def changed(scene: Scene, rng: np.random.Generator, what: str = "words") -> tuple[str, Scene]:
    """A scene whose caption is false of the given one in one fact, and the name of the change.

    Args:
        scene: of which the caption is to be false.
        rng: the only source of randomness.
        what: "words" changes what a phrase says (`groups` and `relation`), "objects" what a dense caption says.
    """
    changes, is_false = (_OF_WORDS, _words_are_false) if what == "words" else (_OF_OBJECTS, _objects_are_false)
    for _ in range(_ATTEMPTS):
        for name in _order(rng, changes):
            for _ in range(_DRAWS):
                other = changes[name](scene, rng)
                if other is None:
                    break
                if is_false(other, scene):
                    return name, other
    raise RuntimeError(f"nothing of {scene} can be changed in {_ATTEMPTS} attempts")


def _order(rng: np.random.Generator, changes: Mapping[str, Change]) -> list[str]:
    """The changes, each before the others as often as its weight says (Efraimidis and Spirakis 2006)."""
    return sorted(changes, key=lambda name: rng.random() ** (1 / WEIGHTS[name]), reverse=True)


def _words_are_false(other: Scene, scene: Scene) -> bool:
    return not requirement(other).met_by(scene.objects) and not said_heldout(other.groups, other.relation)


def _objects_are_false(other: Scene, scene: Scene) -> bool:
    def said(scene: Scene) -> list[tuple[str, str, str]]:
        return sorted((item.colour, item.kind, place(item)) for item in scene.objects)

    return said(other) != said(scene) and not is_heldout(other)


# --- what a phrase says ----------------------------------------------------------------------------------------------


def _with(scene: Scene, **groups: Group) -> Scene:
    """With some groups replaced, `_0` the first."""
    return dataclasses.replace(scene, groups=tuple(groups.get(f"_{i}", group) for i, group in enumerate(scene.groups)))


def _other_colour(scene: Scene, rng: np.random.Generator) -> Scene | None:
    coloured = [i for i, group in enumerate(scene.groups) if group.colour]
    if not coloured:
        return None
    i, used = pick(rng, coloured), {group.colour for group in scene.groups}
    colour = pick(rng, [colour for colour in COLOURS if colour not in used])
    return _with(scene, **{f"_{i}": dataclasses.replace(scene.groups[i], colour=colour)})


def _other_kind(scene: Scene, rng: np.random.Generator) -> Scene | None:
    i, used = pick(rng, range(len(scene.groups))), {group.kind for group in scene.groups}
    kind = pick(rng, [kind for kind in KINDS if kind not in used])
    return _with(scene, **{f"_{i}": dataclasses.replace(scene.groups[i], kind=kind)})


def _other_number(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Of what a true caption counts too: several of a kind, or one kind without a colour."""
    groups = scene.groups
    single = all(group.count == 1 for group in groups)
    if single and (len(groups) > 1 or any(group.colour for group in groups)):
        return None
    spare = MOST_OBJECTS - sum(group.count for group in groups)
    choices = [
        (i, count)
        for i, group in enumerate(groups)
        for count in range(1, group.count + spare + 1)
        if count != group.count
    ]
    i, count = pick(rng, choices)
    return _with(scene, **{f"_{i}": dataclasses.replace(groups[i], count=count, size=None)})


def _other_position(scene: Scene, rng: np.random.Generator) -> Scene | None:
    if scene.relation is None:
        return None
    if rng.random() < 0.5:
        return dataclasses.replace(scene, groups=scene.groups[::-1])
    return dataclasses.replace(scene, relation=pick(rng, [r for r in RELATIONS if r != scene.relation]))


def _other_binding(scene: Scene, rng: np.random.Generator) -> Scene | None:
    coloured = [i for i, group in enumerate(scene.groups) if group.colour]
    if len(coloured) < 2:
        return None
    i, j = (coloured[n] for n in rng.permutation(len(coloured))[:2])
    first, second = scene.groups[i], scene.groups[j]
    swapped = {
        f"_{i}": dataclasses.replace(first, colour=second.colour),
        f"_{j}": dataclasses.replace(second, colour=first.colour),
    }
    return _with(scene, **swapped)


def _other_objects(scene: Scene, rng: np.random.Generator) -> Scene | None:
    groups = scene.groups
    group, *others = groups
    if others:
        left_out = pick(rng, range(len(groups)))
        return dataclasses.replace(scene, groups=tuple(g for i, g in enumerate(groups) if i != left_out), relation=None)
    if group.count > 1:
        return None
    kind = pick(rng, [kind for kind in KINDS if kind != group.kind])
    colour = pick(rng, [colour for colour in COLOURS if colour != group.colour]) if group.colour else None
    pair = (dataclasses.replace(group, size=None), Group(kind, colour=colour))
    return dataclasses.replace(scene, groups=pair if rng.random() < 0.5 else pair[::-1])


_OF_WORDS: dict[str, Change] = {
    "colour": _other_colour,
    "kind": _other_kind,
    "number": _other_number,
    "position": _other_position,
    "binding": _other_binding,
    "objects": _other_objects,
}


# --- what a dense caption says ---------------------------------------------------------------------------------------


def _replaced(scene: Scene, index: int, **changes: object) -> Scene:
    """With one object altered."""
    return dataclasses.replace(
        scene,
        objects=tuple(
            dataclasses.replace(item, **changes) if i == index else item  # type: ignore[arg-type]
            for i, item in enumerate(scene.objects)
        ),
    )


def _any(scene: Scene, rng: np.random.Generator) -> int:
    return pick(rng, range(len(scene.objects)))


def _object_of_colour(scene: Scene, rng: np.random.Generator) -> Scene:
    return _replaced(scene, _any(scene, rng), colour=pick(rng, tuple(COLOURS)))


def _object_of_kind(scene: Scene, rng: np.random.Generator) -> Scene:
    return _replaced(scene, _any(scene, rng), kind=pick(rng, KINDS))


def _object_elsewhere(scene: Scene, rng: np.random.Generator) -> Scene:
    if len(scene.objects) == 2 and rng.random() < 0.5:
        a, b = scene.objects
        return dataclasses.replace(
            scene, objects=(dataclasses.replace(a, x=b.x, y=b.y), dataclasses.replace(b, x=a.x, y=a.y))
        )
    return _replaced(scene, _any(scene, rng), x=rng.random(), y=rng.random())


def _objects_of_swapped_colours(scene: Scene, rng: np.random.Generator) -> Scene | None:
    if len(scene.objects) < 2:
        return None
    i, j = (int(n) for n in rng.permutation(len(scene.objects))[:2])
    colours = scene.objects[i].colour, scene.objects[j].colour
    return _replaced(_replaced(scene, i, colour=colours[1]), j, colour=colours[0])


def _more_or_fewer_objects(scene: Scene, rng: np.random.Generator) -> Scene:
    if len(scene.objects) > 1:
        left_out = _any(scene, rng)
        return dataclasses.replace(scene, objects=tuple(item for i, item in enumerate(scene.objects) if i != left_out))
    further = SceneObject(pick(rng, KINDS), pick(rng, tuple(COLOURS)), MIN_SIZE, rng.random(), rng.random())
    return dataclasses.replace(scene, objects=(*scene.objects, further))


_OF_OBJECTS: dict[str, Change] = {
    "colour": _object_of_colour,
    "kind": _object_of_kind,
    "position": _object_elsewhere,
    "binding": _objects_of_swapped_colours,
    "objects": _more_or_fewer_objects,
}


def build(config: SourceConfig, split: Split) -> ShapesChanges:
    """The source of a config; `shapes` says which scenes."""
    return ShapesChanges(config.shapes, split)
