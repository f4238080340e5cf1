"""What is said of a scene: grammatical captions in several phrasings."""

from __future__ import annotations

import numpy as np

from snapgen_jax.data.shapes import Group, Relation, Scene, SceneObject
from snapgen_jax.data.words import article, pick

DENSE_OBJECTS = 2  # of more, a dense caption would be long
NUMBERS = {2: "two", 3: "three", 4: "four"}
_PLURALS = {"cross": "crosses"}
ONE_GROUP = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "{} on a plain background",
    "there {be} {}",
)
MANY_GROUPS = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "there {be} {}")
TWO_GROUPS = ("{} and {}", "{} and {}", "{} with {}", "{} together with {}")
PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
RELATED = ("{a} {r} {b}", "{a} {r} {b}", "{a} {be} {r} {b}", "a photo of {a} {r} {b}", "a picture of {a} {r} {b}")


def plural(kind: str) -> str:
    """Of a kind: "stars"."""
    return _PLURALS.get(kind, kind + "s")


def phrase(group: Group) -> str:
    """A group as a noun phrase: "a star", "an orange circle", "two red crosses", "a small ring"."""
    words = [word for word in (group.size, group.colour) if word]
    if group.count > 1:
        words += [plural(group.kind)]
        return " ".join([NUMBERS[group.count], *words])
    words += [group.kind]
    return " ".join([article(words[0]), *words])


def _verb(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def layout(scene: Scene) -> str:
    """Everything that there is to know of a scene: colour, kind, place and size of each object in sixteenths of the
    picture. A model given this instead of a caption need not understand language, nor decide where things go."""
    parts = [f"{o.colour} {o.kind} {int(16 * o.x)} {int(16 * o.y)} {int(16 * o.size)}" for o in scene.objects]
    return " ; ".join(sorted(parts))


def place(item: SceneObject) -> str:
    """Where an object lies in thirds of the picture: "top left", "right", "centre" ..."""
    row = ("top", "", "bottom")[int(3 * item.y)]
    column = ("left", "", "right")[int(3 * item.x)]
    return f"{row} {column}".strip() or "centre"


def dense(scene: Scene, rng: np.random.Generator) -> str:
    """The colour, kind and place of one or two objects, in any order: "a red ring top left and a blue star right".

    What dense recaptioning is to photographs (Betker et al. 2023, section 3): it says more of the picture, so that more
    of the picture teaches what words mean, and which word belongs to which.
    """
    items = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    nouns = [f"{article(item.colour)} {item.colour} {item.kind} {place(item)}" for item in items]
    joined = pick(rng, TWO_GROUPS) if len(nouns) == 2 else "{}"
    return pick(rng, MANY_GROUPS).format(joined.format(*nouns), be="is")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Says a scene in one of several phrasings, drawn from `rng`."""
    nouns = [phrase(group) for group in scene.groups]
    first = scene.groups[0]
    if scene.relation is not None:
        words = pick(rng, PHRASES[scene.relation])
        return pick(rng, RELATED).format(a=nouns[0], b=nouns[1], r=words, be=_verb(first))
    if len(nouns) == 1:
        return pick(rng, ONE_GROUP).format(nouns[0], be=_verb(first))
    joined = pick(rng, TWO_GROUPS) if len(nouns) == 2 else ", ".join(["{}"] * (len(nouns) - 1)) + " and {}"
    return pick(rng, MANY_GROUPS).format(joined.format(*nouns), be=_verb(first))
