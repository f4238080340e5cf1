"""Line charts as inline SVG: no script, no library, colours from the page's style sheet."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24
MOST_POINTS = 240


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: `y` over `x`, in the order of `x`; values that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    title: str, lines: Sequence[Series], *, axis: Literal["linear", "auto"] = "linear", ordered: bool = False
) -> str:
    """A figure with all lines in one frame, over steps.

    Long lines are averaged into bins, and a single one shows the range in each bin.

    Args:
        title: what the vertical axis measures.
        lines: the lines. Without a finite point in any of them there is no chart, and the text is empty.
        axis: the vertical one; "auto" is logarithmic where positive values span more than a factor of 30.
        ordered: whether the lines are steps of one quantity (timesteps, say), to be drawn in shades of one colour.
    """
    binned = [(series.name, _bins(series)) for series in lines]
    binned = [(name, bins) for name, bins in binned if len(bins)]
    if not binned:
        return ""
    every = np.concatenate([bins for _, bins in binned])  # [N, 4]: x, mean, low, high
    low, high = float(every[:, 2].min()), float(every[:, 3].max())
    scale = _Scale(low, high, logarithmic=axis == "auto" and low > 0 and high / low > 30)
    span = (float(min(series.x[0] for series in lines if len(series.x))), float(every[:, 0].max()))

    def place(x: float, y: float) -> str:
        across = (x - span[0]) / max(span[1] - span[0], 1e-12)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{TOP + (1 - scale(y)) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [_axes(scale, span)]
    if len(binned) == 1:
        bins = binned[0][1]
        edge = [place(x, top) for x, _, _, top in bins] + [place(x, bottom) for x, _, bottom, _ in bins[::-1]]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    for number, (name, bins) in enumerate(binned):
        colour = _colour(number, len(binned), ordered)
        points = " ".join(place(x, y) for x, y, _, _ in bins)
        label = html.escape(f"{name}: {_short(bins[-1][1])} at the end")
        if len(bins) == 1:
            x, y = points.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:{colour}"><title>{label}</title></circle>')
        else:
            parts.append(f'<polyline style="stroke:{colour}" points="{points}"><title>{label}</title></polyline>')
    legend = "".join(
        f'<span><i style="background:{_colour(number, len(binned), ordered)}"></i>{html.escape(name)}</span>'
        for number, (name, _) in enumerate(binned)
        if len(binned) > 1
    )
    last = _short(binned[0][1][-1][1]) if len(binned) == 1 else ""
    heading = html.escape(title, quote=True)
    return (
        f'<figure class="chart"><figcaption><b>{heading}</b><em>{last}</em></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{heading} over steps">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _bins(series: Series) -> np.ndarray:
    """`[N, 4]`: step, mean, lowest, highest of each bin."""
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    chunks = [c for c in np.array_split(np.arange(len(x)), min(len(x), MOST_POINTS) or 1) if len(c)]
    rows = [(x[c[-1]], y[c].mean(), np.percentile(y[c], 5), np.percentile(y[c], 95)) for c in chunks]
    return np.asarray(rows).reshape(-1, 4)


class _Scale:
    """Value -> 0 (bottom) to 1 (top), with round tick values."""

    def __init__(self, low: float, high: float, *, logarithmic: bool):
        if low == high:
            low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
        self.map = math.log10 if logarithmic else float
        if logarithmic:
            self.low, self.high = low, high
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            self.ticks = [10.0**d for d in decades if low <= 10.0**d <= high * 1.0001] or [low, high]
        else:
            self.ticks = _round_ticks(low, high)
            self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def __call__(self, value: float) -> float:
        low, high = self.map(self.low), self.map(self.high)
        return (self.map(value) - low) / (high - low)


def _round_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [n * step for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _axes(scale: _Scale, span: tuple[float, float]) -> str:
    parts = []
    for tick in scale.ticks:
        y = TOP + (1 - scale(tick)) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_short(tick)}</text>')
    for x, anchor, value in ((LEFT, "start", span[0]), (WIDTH - RIGHT, "end", span[1])):
        text = _short(value) if anchor == "start" else f"step {_short(value)}"
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts)


def _short(value: float) -> str:
    """A number in four digits or so: "12k", "0.0314", "2e-05"."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _colour(number: int, count: int, ordered: bool) -> str:
    if ordered and count > 1:
        return f"color-mix(in oklch, var(--line-first), var(--line-last) {100 * number / (count - 1):.0f}%)"
    return f"var(--line-{number % 6})"
