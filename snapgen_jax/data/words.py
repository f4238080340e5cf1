"""The little English that captions need, and the choice among phrasings."""

import pathlib
import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from snapgen_jax.data.errors import DataError

T = TypeVar("T")

# Words that a mirror makes wrong: "left", "Right-hand", "rightmost", "leftwards", "left's" ...
_SIDES = re.compile(r"\b(left|right)(most|wards?|hand(ed)?)?\b", re.IGNORECASE)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items. Many times faster than `rng.choice` on a short tuple."""
    return items[int(rng.random() * len(items))]


def pick_index(rng: np.random.Generator, count: int, weights: Sequence[float] | None = None) -> int:
    """An index below `count`, evenly or by relative weights. One draw either way."""
    point = rng.random()
    if weights is None:
        return int(point * count)
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends, point * ends[-1], side="right"))


def article(word: str) -> str:
    """ "a" or "an", by the first letter."""
    return "an" if word[:1].lower() in tuple("aeiou") else "a"


def class_caption(name: str) -> str:
    """The caption of a class label: "a photo of an orange cat" from "orange_cat"."""
    name = name.replace("_", " ").strip()
    return f"a photo of {article(name)} {name}"


def read_class_names(file: str) -> list[str]:
    """The class names of a text file, one a line, in the order of the labels.

    Raises:
        DataError: there are none, or the file is not there or is not UTF-8.
    """
    try:
        names = [line.strip() for line in pathlib.Path(file).read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the class names {file!r} cannot be read: {error}; give a text file, one name a line"
        ) from error
    if not any(names):
        raise DataError(f"{file!r} holds no class names; write one a line")
    return [name for name in names if name]


def require_text(text: str, what: str) -> str:
    """The text, if it can be written down in UTF-8.

    A command line or a file in another encoding leaves lone surrogates in it, each half of a character.

    Raises:
        DataError: it cannot; begins with `what` it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(f"{what} {text!a} is no text at {half}: it was not UTF-8; write it in UTF-8") from error
    return text


def speaks_of_sides(text: str) -> bool:
    """Whether a text says "left" or "right" in any sense, so that its picture cannot be mirrored. English only."""
    return _SIDES.search(text) is not None
