"""The little English that captions need, and the choice among phrasings."""

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Words that a mirror makes wrong: "left", "Right-hand", "rightmost", "leftwards", "left's" ...
_SIDES = re.compile(r"\b(left|right)(most|wards?|hand(ed)?)?\b", re.IGNORECASE)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items. Many times faster than `rng.choice` on a short tuple."""
    return items[int(rng.random() * len(items))]


def article(word: str) -> str:
    """ "a" or "an", by the first letter."""
    return "an" if word[:1].lower() in tuple("aeiou") else "a"


def class_caption(name: str) -> str:
    """The caption of a class label: "a photo of an orange cat" from "orange_cat"."""
    name = name.replace("_", " ").strip()
    return f"a photo of {article(name)} {name}"


def speaks_of_sides(text: str) -> bool:
    """Whether a text says "left" or "right" in any sense, so that its picture cannot be mirrored. English only."""
    return _SIDES.search(text) is not None
