"""Four bits where they do no harm, eight elsewhere: a search over layers, judged by what is drawn.

    1. Each layer alone is put into four bits, all else stays float32, and half of the calibration examples are drawn.
       The squared error that this makes in the median example is the layer's damage.
    2. Layers are put in order of damage for each byte that is saved.
    3. The first k layers take four bits and all others eight, and the examples are drawn again. Bisection finds the
       largest k whose median example keeps to the decibels, or the smallest whose files keep to the bytes.

Nothing is drawn at random, so that the same files and examples give the same choice.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.bounds import above, check
from snapgen_jax.export.judging import fidelity
from snapgen_jax.export.precision import Layer, QuantisationError, layers, quantise

DECIBELS = 40.0
PROGRESS_SECONDS = 20.0
Outputs = Mapping[str, np.ndarray]
Files = Mapping[str, pathlib.Path]
Draw = Callable[[Files, int], Outputs]

log = logging.getLogger(__name__)


class BudgetError(RuntimeError):
    """No choice of layers keeps to the budget. Says what can be had."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a mixed variant may cost.

    Attributes:
        bytes: the most that all its files take together, 1 MB being 1,000,000; None for no limit.
        decibels: the least peak signal-to-noise ratio of the median calibration example. Where neither is given, it is
            40 dB.
    """

    bytes: float | None = None
    decibels: float | None = None

    def __post_init__(self) -> None:
        check(self, bytes=above(0), decibels=above(0))


BUDGET = Budget()


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was found.

    Attributes:
        four: {unit: its layers of four bits}.
        eight: {unit: its layers that could take four bits and take eight}.
        bytes: of all files.
        decibels: of the median calibration example.
        examples: how many there were.
        budget: what it keeps to.
    """

    four: Mapping[str, Sequence[Layer]]
    eight: Mapping[str, Sequence[Layer]]
    bytes: int
    decibels: float
    examples: int
    budget: Budget

    def describe(self) -> dict[str, Any]:
        """For the manifest: the bits of each layer of each unit, by the operators that use it."""
        bits = {
            unit: [
                {"operators": list(layer.scopes), "kind": layer.kind, "shape": list(layer.shape), "bits": n}
                for n, chosen in ((4, self.four[unit]), (8, self.eight[unit]))
                for layer in chosen
            ]
            for unit in self.four
        }
        return {
            "budget": {"bytes": self.budget.bytes, "decibels": self.budget.decibels},
            "bytes": self.bytes,
            "median_db": self.decibels,
            "examples": self.examples,
            "layers": bits,
        }


def search(
    sources: Files,
    targets: Files,
    draw: Draw,
    expected: Outputs,
    budget: Budget = BUDGET,
) -> Choice:
    """Writes files of four and eight bits that keep to a budget.

    Args:
        sources: {unit: its float32 file}.
        targets: {unit: the file to write}.
        draw: `draw(files, count)`, the outputs of the first calibration examples, `{name: [count, ...]}`, by the files
            of some units; those that are not given are float32.
        expected: what the float32 files draw, `{name: [N, ...]}`.
        budget: bytes, decibels, or both.

    Raises:
        BudgetError: the fewest bytes are above the budget, or the best picture below it, or no choice keeps to both.
        QuantisationError: there is nothing that could take four bits.
    """
    if budget.bytes is None and budget.decibels is None:
        budget = dataclasses.replace(budget, decibels=DECIBELS)
    every = [(unit, layer) for unit, path in sources.items() for layer in layers(path)]
    if not every:
        raise QuantisationError("mixed: there is no layer that could take four bits")
    count = len(next(iter(expected.values())))
    order = _ordered(every, sources, targets, draw, expected)
    tried: dict[int, float] = {}
    sizes: dict[int, int] = {}
    last = -1

    def size(k: int) -> int:
        """The bytes of the files with the first k layers in four bits, which are left in place."""
        nonlocal last
        if k != last:
            sizes[k], last = _write(order[:k], sources, targets), k
        return sizes[k]

    def ratio(k: int) -> float:
        """The decibels of those."""
        if k not in tried:
            wrote = size(k)
            tried[k] = float(np.median(fidelity(draw(targets, count), expected)))
            log.info("mixed: %d of %d layers in four bits: %d bytes, %.1f dB", k, len(order), wrote, tried[k])
        return tried[k]

    low, high = 0, len(order)  # of k: what the bytes need at least, what the decibels allow at most
    most, least = budget.bytes, budget.decibels
    if most is not None:
        low = _first(lambda k: size(k) <= most, 0, len(order))
        if low > len(order):
            raise BudgetError(
                f"mixed: the budget is {most:.0f} bytes, and the files are {size(len(order))} with four bits "
                f"in all {len(order)} layers that take them"
            )
    if least is not None:
        high = _first(lambda k: ratio(k) < least, 0, len(order)) - 1
        if high < low:
            within = f" in {most:.0f} bytes" if most is not None else ""
            raise BudgetError(
                f"mixed: the budget asks for {least:.1f} dB{within}; {low} of {len(order)} layers in four "
                f"bits are {size(low)} bytes and {ratio(low):.1f} dB. Ask for less"
            )
    best = low if least is None else high
    four: dict[str, list[Layer]] = {unit: [] for unit in sources}
    eight: dict[str, list[Layer]] = {unit: [] for unit in sources}
    for i, (unit, layer) in enumerate(order):
        (four if i < best else eight)[unit].append(layer)
    decibels = ratio(best)
    return Choice(four, eight, size(best), decibels, count, budget)  # writes what is chosen, last


def _ordered(
    every: Sequence[tuple[str, Layer]],
    sources: Files,
    targets: Files,
    draw: Draw,
    expected: Outputs,
) -> list[tuple[str, Layer]]:
    """Layers, those first that do the least damage for each byte saved, by the first half of the examples."""
    damage, shown = [], time.monotonic()
    few = {name: array[: (len(array) + 1) // 2] for name, array in expected.items()}
    count = len(next(iter(few.values())))
    for number, (unit, layer) in enumerate(every):
        quantise(sources[unit], targets[unit], [layer], others="f32")
        ratio = np.median(fidelity(draw({unit: targets[unit]}, count), few))
        damage.append(10 ** (-float(ratio) / 10) / layer.size)
        if time.monotonic() > shown + PROGRESS_SECONDS:
            log.info("mixed: %d of %d layers tried", number + 1, len(every))
            shown = time.monotonic()
    return [every[i] for i in np.argsort(damage, kind="stable")]


def _write(four: Sequence[tuple[str, Layer]], sources: Files, targets: Files) -> int:
    """Writes the files with these layers in four bits; returns the bytes of all."""
    for unit, source in sources.items():
        quantise(source, targets[unit], [layer for name, layer in four if name == unit])
    return sum(target.stat().st_size for target in targets.values())


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least k of low..high at which something holds that goes on to hold; high + 1 where it never does."""
    end = high + 1
    while low < end:
        middle = (low + end) // 2
        if holds(middle):
            end = middle
        else:
            low = middle + 1
    return low
