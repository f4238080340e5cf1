"""How many bits each layer is given, from what its quantisation costs (BitsFusion, arXiv 2406.04333, section 4.3).

    S(i, b) = M(i, b) N_i^-eta,   b_i = min{b in 1, 2, 3: S(i, b) < S_o},   4 where there is none

M is the squared error of the images that a network draws with layer i alone in b bits, and N_i the number of its
weights: a large layer is worth more error. Layers whose quantisation makes images fit their prompts less are then given
more, whatever their error. S_o is found for the average that is wanted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from snapgen_jax.networks.quantise import level_count

MEASURED = (1, 2, 3)
OTHERWISE = 4
RAISED_SHARES = (0.10, 0.05, 0.02)  # the layers of the largest drop; each share is given one bit more


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Bits of layers.

    Attributes:
        bits: `{layer: bits}`.
        average: mean over all weights of log2 of the number of levels.
        threshold: S_o.
        raised: `{layer: further bits}` for the sake of the prompts.
    """

    bits: Mapping[str, int]
    average: float
    threshold: float
    raised: Mapping[str, int]


def sensitivity(error: float, size: int, eta: float) -> float:
    """S of one layer and one number of bits."""
    return error * size**-eta


def raised_bits(drops: Mapping[str, float]) -> dict[str, int]:
    """`{layer: 1, 2 or 3}`: the tenth of the layers with the largest drop has one bit more, its first half another, and
    the first fiftieth of all a third. A layer without a drop has none.

    Args:
        drops: `{layer: by how much less the images fit their prompts with this layer in 3 bits}`.
    """
    ordered = sorted(drops, key=lambda name: -drops[name])
    counts = [math.ceil(share * len(ordered)) for share in RAISED_SHARES]
    more = {name: sum(i < count for count in counts) for i, name in enumerate(ordered)}
    return {name: extra for name, extra in more.items() if extra and drops[name] > 0}


def average(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Mean over the weights of log2 of the number of balanced levels."""
    return sum(math.log2(level_count(b)) * sizes[name] for name, b in bits.items()) / sum(sizes[n] for n in bits)


def assign(
    errors: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    target: float,
    *,
    eta: float = 0.3,
    drops: Mapping[str, float] | None = None,
) -> Assignment:
    """The bits of all layers, at most `target` on average.

    S_o is the smallest threshold that stays within the target: bisected over the sensitivities that were measured,
    between which nothing changes. What is left of the target then goes to the layers that are next, the most sensitive
    first, as far as each still fits: with few layers one step of a large one is more than the average may be off.

    Args:
        errors: `{layer: {bits: M}}` of the bits in `MEASURED`.
        sizes: `{layer: N}`.
        target: wanted average, in log2 of the number of levels.
        eta: see the top of this file.
        drops: see `raised_bits`.

    Raises:
        ValueError: the target is below what one bit everywhere, with what is raised, takes.
    """
    raised = raised_bits(drops or {})
    scores = {name: {b: sensitivity(of[b], sizes[name], eta) for b in MEASURED} for name, of in errors.items()}

    def bits_at(threshold: float) -> dict[str, int]:
        found = {n: next((b for b in MEASURED if s[b] < threshold), OTHERWISE) for n, s in scores.items()}
        return {name: b + raised.get(name, 0) for name, b in found.items()}

    steps = sorted({s for of in scores.values() for s in of.values()})
    thresholds = [*steps, math.nextafter(steps[-1], math.inf)]  # at the last, all are of one bit
    low, high = 0, len(thresholds) - 1
    if (least := average(bits_at(thresholds[high]), sizes)) > target:
        raise ValueError(
            f"an average of {target:g} bits is less than {least:.3f}, which one bit of each layer"
            f"{' and what is raised for the sake of the prompts' if raised else ''} takes; ask for more"
        )
    while low < high:
        middle = (low + high) // 2
        if average(bits_at(thresholds[middle]), sizes) <= target:
            high = middle
        else:
            low = middle + 1
    bits = bits_at(thresholds[high])
    nearest = sorted(bits, key=lambda n: -scores[n].get(bits[n] - raised.get(n, 0), 0.0))
    for name in nearest:
        larger = {**bits, name: bits[name] + 1}
        if bits[name] - raised.get(name, 0) < OTHERWISE and average(larger, sizes) <= target:
            bits = larger
    return Assignment(bits, average(bits, sizes), thresholds[high], raised)
