"""The measurements of a bundle as a picture: a bar for each latency, with its quartiles, and one for each peak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from snapgen_jax.export.bench import short

ROW, LABEL, BAR, GAP, NUMBER = 22, 250, 300, 30, 80
COLOURS = {"f32": "#4c72b0", "f16": "#55a868", "int8": "#c44e52", "mixed": "#8172b3"}
MOST_RATIO = 20  # of latencies on one linear axis
OTHER, INK = "#777777", "#222222"


def draw(found: Mapping[str, Any]) -> Image.Image:
    """What `bench` returned, RGB: a row for each measurement, milliseconds to the left and megabytes to the right."""
    rows = [row for row in found["rows"] if "error" not in row]
    width, height = LABEL + 2 * (BAR + NUMBER + GAP), ROW * (len(rows) + 3)
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    second = LABEL + BAR + NUMBER + GAP
    pen.text((8, 4), f"{found['bundle']}: {found['machine']}", INK, font)
    slowest, fastest = (pick((row["ms_quartiles"][i] for row in rows), default=1.0) for pick, i in ((max, 1), (min, 0)))
    logarithmic = slowest > MOST_RATIO * fastest

    def along(ms: float) -> float:
        """How far to the right a latency lies, 0 to 1."""
        return math.log(2 * ms / fastest) / math.log(2 * slowest / fastest) if logarithmic else ms / slowest

    scale = ", logarithmic" if logarithmic else ""
    pen.text((LABEL, ROW), f"ms a call: median and quartiles{scale}", INK, font)
    pen.text((second, ROW), "peak of the process, MB", INK, font)
    largest = max((row["peak_bytes"] for row in rows), default=1)
    for i, row in enumerate(rows):
        top = ROW * (i + 2)
        middle, colour = top + ROW // 2 - 2, COLOURS.get(row["precision"], OTHER)
        threads = f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}" if row["accelerator"] == "cpu" else ""
        pen.text((8, top), f"{row['unit']} {row['precision']} {row['accelerator']}{threads}", INK, font)
        low, high = (LABEL + BAR * along(q) for q in row["ms_quartiles"])
        pen.rectangle((LABEL, top + 3, LABEL + BAR * along(row["ms"]), top + ROW - 7), fill=colour)
        pen.line((low, middle, high, middle), INK)
        pen.text((LABEL + BAR + 6, top), short(row["ms"]), INK, font)
        pen.rectangle((second, top + 3, second + BAR * row["peak_bytes"] / largest, top + ROW - 7), fill=colour)
        pen.text((second + BAR + 6, top), f"{row['peak_bytes'] / 1e6:.0f}", INK, font)
    return picture
