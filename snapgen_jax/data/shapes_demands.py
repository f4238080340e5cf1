"""What a caption of the shapes world demands, read off its words: the grammar of `shapes_captions`, backwards.

A network that has no text encoder, such as the detector of `networks/detection.py`, is given it as a row of numbers:

    kind, colour, count of the first group; the same of each further one; and the relation of the first to the second

Kinds, colours and relations are numbered from 1 in the order of `shapes`; 0 is for none: a group that is not there, a
colour that is not named, no relation. The empty text demands nothing, and is all zeros.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from snapgen_jax.data import shapes_captions as grammar
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.prompts import Demand, Requirement
from snapgen_jax.data.shapes import COLOURS, KINDS, RELATIONS, Relation, SizeWord
from snapgen_jax.data.words import require_text

NUMBERS_OF_A_DEMAND = 3  # kind, colour, count
_COLOURS, _SIZES = tuple(COLOURS), SizeWord.__args__  # type: ignore[attr-defined]
_COUNTS = {"a": 1, "an": 1, **{word: count for count, word in grammar.NUMBERS.items()}}
_PLURALS = {grammar.plural(kind): kind for kind in KINDS}
_RELATIONS: dict[str, Relation] = {words: name for name, phrases in grammar.PHRASES.items() for words in phrases}


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def _pattern(template: str, **parts: str) -> re.Pattern[str]:
    """A template of the grammar as an expression; "{}" is any text."""
    filled = {"": "(.+)", "be": "(?:is|are)", **parts}
    pieces = re.split(r"\{(\w*)\}", template)
    return re.compile("".join(filled[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)))


_GROUP = re.compile(
    rf"({_any(tuple(_COUNTS))}) (?:(?:{_any(_SIZES)}) )?(?:({_any(_COLOURS)}) )?({_any((*KINDS, *_PLURALS))})"
)
_FRAMES = [_pattern(template) for template in dict.fromkeys((*grammar.ONE_GROUP, *grammar.MANY_GROUPS))]
_RELATED = [
    _pattern(template, a="(?P<a>.+?)", b="(?P<b>.+)", r=f"(?P<r>{_any(tuple(_RELATIONS))})")
    for template in dict.fromkeys(grammar.RELATED)
]
_JOINTS = re.compile(_any([template.strip("{}") for template in grammar.TWO_GROUPS] + [", "]))


def demanded(text: str) -> Requirement | None:
    """What a caption or prompt demands, as `prompts.requirement` says it of the scene; None if the grammar has no such
    words. Case, and white space beside single spaces, do not matter. Size words are read and not demanded."""
    text = " ".join(text.lower().split())
    for pattern in _RELATED:
        if match := pattern.fullmatch(text):
            groups = [_group(match["a"]), _group(match["b"])]
            if None not in groups:
                return Requirement(tuple(group for group in groups if group), _RELATIONS[match["r"]])
    for pattern in _FRAMES:
        if match := pattern.fullmatch(text):
            groups = [_group(part) for part in _JOINTS.split(match[1])]
            if None not in groups:
                return Requirement(tuple(group for group in groups if group))
    return None


def _group(text: str) -> Demand | None:
    match = _GROUP.fullmatch(text)
    if match is None:
        return None
    count, noun = _COUNTS[match[1]], match[3]
    if (noun in _PLURALS) != (count > 1):
        return None
    return Demand(_PLURALS.get(noun, noun), count, match[2])


def numbers(requirement: Requirement, length: int) -> np.ndarray:
    """A requirement as a row of numbers, see the top of this file.

    Args:
        requirement: of kinds and colours of the shapes world.
        length: L, 1 + 3 times the number of groups that there is room for.

    Returns:
        int32 `[L]`.

    Raises:
        ValueError: there is no room for its groups.
    """
    room = (length - 1) // NUMBERS_OF_A_DEMAND
    if len(requirement.demands) > room:
        raise ValueError(
            f"it demands {len(requirement.demands)} different groups of objects, and there is room for {room}"
        )
    row = np.zeros(length, np.int32)
    for i, demand in enumerate(requirement.demands):
        colour = 0 if demand.colour is None else 1 + _COLOURS.index(demand.colour)
        row[3 * i : 3 * i + 3] = 1 + KINDS.index(demand.kind), colour, demand.count
    row[-1] = 0 if requirement.relation is None else 1 + RELATIONS.index(requirement.relation)
    return row


def _overlapping(demands: Sequence[Demand]) -> tuple[str, str] | None:
    """The words of two groups that one object fits both; None where every object fits one at most."""
    for first, second in itertools.combinations(demands, 2):
        same_colour = first.colour == second.colour or None in (first.colour, second.colour)
        if first.kind == second.kind and same_colour:
            words = [" ".join(filter(None, (demand.colour, demand.kind))) for demand in (first, second)]
            return f"a {words[0]}", f"a {words[1]}"
    return None


class DemandTokenizer:
    """Captions to what they demand. Stands where a tokenizer does, and holds no state."""

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads texts.

        Args:
            texts: N captions or prompts of the shapes world; the empty one demands nothing.
            length: L, as for `numbers`.

        Returns:
            int32 `[N, L]`; and float32 `[N, L]`, 1 at the numbers of each group that there is and of a relation.

        Raises:
            DataError: the shapes world has no such caption, it demands too much, or two of its groups overlap.
        """
        rows = np.stack([self._row(require_text(text, "the caption or prompt"), length) for text in texts])
        groups = rows[:, :-1].reshape(len(texts), -1, NUMBERS_OF_A_DEMAND)
        there = np.repeat(groups[..., :1] > 0, NUMBERS_OF_A_DEMAND, axis=2).reshape(len(texts), -1)
        return rows, np.concatenate([there, rows[:, -1:] > 0], axis=1).astype(np.float32)

    def _row(self, text: str, length: int) -> np.ndarray:
        requirement = demanded(text) if text.strip() else Requirement(())
        if requirement is None:
            raise DataError(
                f"{text!r} is no caption whose demands can be read: expected words of the shapes world such as 'two "
                "stars' or 'a red circle left of a blue square'. Dense captions, which say places, and layouts have "
                "none: set data.shapes.dense_share=0 and data.shapes.captions='phrases'; or use a reward that reads "
                "any text, such as 'matching'"
            )
        if overlap := _overlapping(requirement.demands):
            raise DataError(
                f"{text!r} is met by no image: {overlap[0]} and {overlap[1]} may be one object, and each counts in "
                "every group that it fits. Ask for groups of different kinds, for two colours of one kind, or for a "
                "number, such as 'two red circles'"
            )
        try:
            return numbers(requirement, length)
        except ValueError as error:
            raise DataError(f"{text!r}: {error}; ask for fewer, or set `network.demands` of the detector") from error
