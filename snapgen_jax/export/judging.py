"""Whether a variant of a network draws as well as the float32 file: judged by what it draws, not by its numbers.

Where a recipe has an exact score, both draw the same prompts from the same noise, and the verdicts are compared prompt
by prompt. A trajectory may well differ and be as good, so that is the better judge. Other recipes are judged by how far
the outputs are apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize

from snapgen_jax.bounds import check, within
from snapgen_jax.export.compare import VerificationError

CONFIDENCE = 1.6448536269514722  # standard deviations: a bound that the truth exceeds with 95%
PAIRED = "paired score"
MOST_DECIBELS = 99.0  # of two outputs that are equal


class VariantError(VerificationError):
    """A variant is not good enough, or cannot be had. The message says why, and by what measure."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """An exact score of pictures.

    Attributes:
        name: of the score.
        prompts: as many as there are; those at the beginning are a fair choice of all.
        indices: of the noise of each.
        passes: `passes(prompt number, uint8 [H, W, 3])`, whether the picture shows what the prompt says.
    """

    name: str
    prompts: Sequence[str]
    indices: Sequence[int]
    passes: Callable[[int, np.ndarray], bool]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a variant must hold.

    Attributes:
        prompts: how many are drawn to judge it by an exact score; 0 for judging by decibels alone.
        loss: the share of prompts that it may lose: the lower bound of (gained - lost) / prompts is at least -loss.
        decibels: where there is no exact score, the least peak signal-to-noise ratio of the median example.
    """

    prompts: int = 192
    loss: float = 0.05
    decibels: float = 35.0

    def __post_init__(self) -> None:
        check(self, prompts=within(0, 100_000), loss=within(0, 1), decibels=within(0, MOST_DECIBELS))


LIMITS = Limits()


def paired_low(gained: int, lost: int, trials: int) -> float:
    """The lower bound of a paired difference of shares, (gained - lost) / trials, that the truth exceeds with 95%.

    The score interval of Tango 1998 ("Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design", Statistics in Medicine 17): unlike a bootstrap it has a width where nothing was gained or
    lost.

    Raises:
        ValueError: more were gained and lost than tried, or nothing was tried.
    """
    if min(gained, lost) < 0 or gained + lost > trials or trials < 1:
        raise ValueError(
            f"{gained} gained and {lost} lost of {trials}; expected no more than were tried, and one or more"
        )

    def excess(difference: float) -> float:
        b = (2 * trials - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        q = (math.sqrt(b * b - 8 * trials * c) - b) / (4 * trials)
        variance = trials * (2 * q + difference * (1 - difference))
        return (gained - lost - trials * difference) / math.sqrt(max(variance, 1e-300)) - CONFIDENCE

    mean = (gained - lost) / trials
    return -1.0 if mean == -1 else float(optimize.root_scalar(excess, bracket=(-1 + 1e-9, mean - 1e-9)).root)


def decibels(made: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of each example, `[N, ...] -> [N]`, 99 at most.

    The peak is 255 of pictures, and the range of `expected` of anything else. Not a number counts as 0 dB.
    """
    peak = 255.0 if expected.dtype == np.uint8 else float(np.ptp(expected)) or 1.0
    axes = tuple(range(1, expected.ndim))
    error = np.mean((np.asarray(made, np.float64) - expected) ** 2, axis=axes)
    ratio = 10 * np.log10(peak**2 / np.maximum(error, peak**2 * 10 ** (-MOST_DECIBELS / 10)))
    return np.where(np.isfinite(error), ratio, 0.0)


def fidelity(made: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> np.ndarray:
    """The decibels of each example, `[N]`, in the output that is worst."""
    return np.min([decibels(made[name], array) for name, array in expected.items()], axis=0)


def describe_fidelity(ratios: np.ndarray) -> dict[str, Any]:
    """For the manifest."""
    return {"examples": len(ratios), "median_db": float(np.median(ratios)), "worst_db": float(ratios.min())}


def paired(judge: Judge, expected: np.ndarray, made: np.ndarray) -> dict[str, Any]:
    """The verdicts on a variant's pictures beside those on the float32 file's, `uint8 [N, H, W, 3]` each of the first N
    prompts: for the manifest."""
    before, after = ([judge.passes(i, image) for i, image in enumerate(images)] for images in (expected, made))
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    count = len(before)
    return {
        "score": judge.name,
        "prompts": count,
        "f32": sum(before) / count,
        "variant": sum(after) / count,
        "gained": gained,
        "lost": lost,
        "low": paired_low(gained, lost, count),
    }


def objection(found: Mapping[str, Any], limits: Limits) -> str | None:
    """Why a variant is refused; None where it is not. `found` has what `describe_fidelity` returned, `judged_by` and,
    where there is an exact score, as "paired" what `paired` did."""
    if found["judged_by"] == PAIRED:
        score = found["paired"]
        if score["low"] >= -limits.loss:
            return None
        return (
            f"of {score['prompts']} prompts it gains {score['gained']} verdicts of the {score['score']} score over "
            f"float32 and loses {score['lost']}: the lower bound of the difference is {score['low']:.3f}, and at least "
            f"{-limits.loss:.3f} is accepted"
        )
    if found["median_db"] >= limits.decibels:
        return None
    return (
        f"its median example is {found['median_db']:.1f} dB from float32's, and at least {limits.decibels:.1f} dB are "
        f"accepted ({found['judged_by']})"
    )


def judged_by(found: Mapping[str, Any], limits: Limits) -> str:
    """By what a variant is judged: the paired score, where there is one that could tell."""
    if "paired" not in found:
        return "decibels, since no exact score is known of the run" if limits.prompts else "decibels, as was asked"
    if found["paired"]["f32"] < 2 * limits.loss:
        return f"decibels, since float32 passes {found['paired']['f32']:.3f} of the prompts and has nothing to lose"
    return PAIRED
