"""What a number or a text of a config may be, said once beside the field: `check(self, every_steps=at_least(1))`.

A dataclass checks its fields in `__post_init__`, so that a value that nobody can mean is refused where it is given:
before anything is compiled or written, and in a notebook too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class FieldError(ValueError):
    """A field of a dataclass cannot have the value that it was given.

    Attributes:
        field: its name.
        reason: the rest of the sentence: what the value is, and what to give.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Finite numbers from `low` to `high`.

    Attributes:
        low, high: the ends, which belong to it unless `open` names them.
        open: "low", "high" or "", the end that is left out.
        hint: what to do in place of the value that somebody may have tried; "" for nothing.
    """

    low: float = -math.inf
    high: float = math.inf
    open: str = ""
    hint: str = ""

    def holds(self, value: float) -> bool:
        """Whether a number lies inside; one that is not finite never does."""
        above = self.low < value if self.open == "low" else self.low <= value
        below = value < self.high if self.open == "high" else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            said = "a finite number"
        elif math.isfinite(self.high):
            said = f"{self.low:g} or more, and less than {self.high:g}"
            said = said if self.open == "high" else f"a number from {self.low:g} to {self.high:.15g}"
        else:
            said = f"a finite number above {self.low:g}" if self.open == "low" else f"{self.low:g} or more"
        return said


def at_least(low: float, hint: str = "") -> Bounds:
    """`low` or more."""
    return Bounds(low, hint=hint)


def above(low: float, hint: str = "") -> Bounds:
    """More than `low`."""
    return Bounds(low, open="low", hint=hint)


def within(low: float, high: float) -> Bounds:
    """From `low` to `high`, both included."""
    return Bounds(low, high)


def below(high: float, low: float = 0.0) -> Bounds:
    """From `low` up to, but not including, `high`."""
    return Bounds(low, high, open="high")


FINITE = Bounds()
SHARE = within(0, 1)
SEED = within(0, 2**31 - 1)  # what an int32 holds, and what NumPy takes: a larger one would stand for another seed


def check(instance: Any, **bounds: Bounds) -> None:
    """Raises `FieldError` for the first field whose number, or one of whose numbers, is out of bounds.

    Args:
        instance: a dataclass, whose fields are numbers, or tuples or mappings of such; None passes.
        bounds: by field.
    """
    for field, allowed in bounds.items():
        value = getattr(instance, field)
        if not all(allowed.holds(number) for number in _numbers(value)):
            hint = f"; {allowed.hint}" if allowed.hint else ""
            each = " each" if isinstance(value, Sequence | Mapping) else ""
            raise FieldError(field, f"is {value}; give {allowed}{each}{hint}")


def check_texts(instance: Any, *fields: str) -> None:
    """Raises `FieldError` for the first of some fields that hold texts with half of a character in one of them, as a
    command line leaves it that is not UTF-8: no tokenizer reads it."""
    for field in fields:
        for text in getattr(instance, field):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise FieldError(field, f"holds {text!a}, which is no text: it was not UTF-8; write it in UTF-8")


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):  # whose items are such texts again, for ever
        for item in value:
            yield from _numbers(item)
    elif value is not None:
        yield value
