"""The tables of the report, as HTML: flat named numbers in, rows for people out."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping

from snapgen_jax import page
from snapgen_jax.data.prompts import CATEGORIES

Numbers = Mapping[str, float]

# What an export is verified against; the numbers of a report are held to the same limits.
LIMITS = {"rel_l2_f32": 1e-5, "rel_l2_f16": 2e-3, "rel_l2_int8": 0.1, "flex_ops": 0}


def _count(value: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def _share(value: float) -> str:
    return f"{value:.2f}"


def _error(value: float) -> str:
    return f"{value:.1e}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _plain(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def tiles(numbers: Numbers) -> str:
    """The headline numbers."""
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("score.overall", "overall score", _share),
        ("score.heldout", "held-out score", _share),
        ("minutes", "minutes", lambda v: f"{v:.1f}"),
        ("images_per_second", "images / second", _count),
        ("images_seen", "images seen", _count),
        ("params", "parameters", _count),
        ("export.bytes_f16", "float16 export", _bytes),
    ]
    present = [(label, how(numbers[name])) for name, label, how in shown if name in numbers]
    return "".join(page.tile(value, label, first=i == 0) for i, (label, value) in enumerate(present))


def scores(numbers: Numbers) -> str:
    """Overall and by category: bar, interval, chance; seen and held out."""
    rows = []
    for name in ("overall", *CATEGORIES):
        value, key = numbers[f"score.{name}"], f"score.{name}"
        low, high = numbers.get(f"{key}.low"), numbers.get(f"{key}.high")
        seen, heldout = (f"score.{s}" if name == "overall" else f"{key}.{s}" for s in ("seen", "heldout"))
        interval = ""
        if low is not None and high is not None:
            interval = f'<i class="interval" style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        chance = ""
        if name == "overall":
            chance = f'<i class="chance" style="left:{100 * numbers["score.chance"]:.1f}%"></i>'
        track = f'<div class="track"><i class="bar" style="width:{100 * value:.1f}%"></i>{interval}{chance}</div>'
        between = f"{low:.2f} - {high:.2f}" if low is not None and high is not None else ""
        sides = [_share(numbers[side]) if side in numbers else "" for side in (seen, heldout)]
        rows.append([name.replace("_", " "), track, _share(value), between, *sides])
    table = page.table(["", "", "score", "95% interval", "seen", "held out"], rows, first_is_whole=True)
    chance = _share(numbers["score.chance"])
    key = (
        f"Red mark: {chance}, what perfect images for other prompts of the category score. Lines: 95% Wilson intervals."
    )
    return f'{table}<div class="legend" style="margin-top:8px">{key}</div>'


_ADVERSARIES = {
    "wrong_shape": "right colours, wrong shapes",
    "wrong_colours": "right number, wrong colours",
    "swapped_colours": "colours of the two objects exchanged",
    "surplus": "one object more",
    "blurred": "blurred past recognition",
    "merged": "merged into one blob",
}


def detector(numbers: Numbers) -> str:
    """How the detector did on trial: share accepted of true renders, and of pictures made to deceive it."""
    if "detector.accuracy" not in numbers:
        return ""
    rows = [
        [
            "true renders",
            f"{numbers['detector.accuracy']:.1%}",
            "at least 99.5%",
            _verdict(numbers["detector.accuracy"] >= 0.995),
        ]
    ]
    for name, label in _ADVERSARIES.items():
        value = numbers.get(f"detector.accepts.{name}")
        if value is not None:
            rows.append([label, f"{value:.1%}", "none", _verdict(value <= 0)])
    table = page.table(["picture", "accepted", "expected", ""], rows)
    return f"<details><summary>The detector on trial</summary>{table}</details>"


def distances(numbers: Numbers) -> str:
    """Frechet distance and diversity, where they were measured."""
    labels = {
        "frechet.distance": "Frechet distance to validation images (fixed random features)",
        "frechet.real": "the same, of real images in place of the generated ones",
        "diversity.pairwise": "mean feature distance between images of one prompt",
    }
    rows = [[label, f"{numbers[name]:.4g}"] for name, label in labels.items() if name in numbers]
    return f'<div style="margin-top:18px">{page.table(["other measures", ""], rows)}</div>' if rows else ""


def _verdict(passed: bool) -> str:
    return '<span class="yes">ok</span>' if passed else '<span class="no">missed</span>'


def _within(name: str, value: float, shown: str) -> str:
    limit = LIMITS.get(name)
    return shown if limit is None else f"{shown} {_verdict(value <= limit)}"


def export_units(numbers: Numbers) -> str:
    """One row for each exported network: distances from JAX and sizes, by precision."""
    units = [m[1] for name in numbers if (m := re.fullmatch(r"export\.(\w+)\.rel_l2_f32", name))]
    columns = {
        "rel_l2_f32": (f"float32 (limit {LIMITS['rel_l2_f32']:.0e})", _error),
        "rel_l2_f16": (f"float16 (limit {LIMITS['rel_l2_f16']:.0e})", _error),
        "rel_l2_int8": (f"eight bits (limit {LIMITS['rel_l2_int8']:g})", _error),
        "bytes_f32": ("float32 file", _bytes),
        "bytes_f16": ("float16 file", _bytes),
        "bytes_int8": ("eight bits", _bytes),
    }
    rows = []
    for unit in units:
        values = {metric: numbers.get(f"export.{unit}.{metric}") for metric in columns}
        cells = ["" if v is None else _within(m, v, columns[m][1](v)) for m, v in values.items()]
        rows.append([html.escape(unit), *cells])
    return page.table(["network", *(label for label, _ in columns.values())], rows)


def export_totals(numbers: Numbers) -> str:
    """What holds of the whole bundle."""
    labels: dict[str, tuple[str, Callable[[float], str]]] = {
        "flex_ops": ("operators outside the TFLite set", _plain),
        "bytes_f32": ("all float32 files", _bytes),
        "bytes_f16": ("all float16 files", _bytes),
        "bytes_int8": ("all files of eight bits", _bytes),
        "paired.difference_f16": ("score of float16, less that of float32, prompt by prompt", _signed),
        "paired.low_f16": ("its lower bound", _signed),
        "paired.difference_int8": ("score of eight bits, less that of float32, prompt by prompt", _signed),
        "paired.low_int8": ("its lower bound", _signed),
        "seconds_per_image": ("seconds an image on LiteRT, this machine", lambda v: f"{v:.2f}"),
        "image.max_grey_f32": ("largest difference of an image, grey levels", _plain),
        "image.max_grey_to_generator": ("largest difference from the JAX sampler, grey levels", _plain),
    }
    rows = [
        [label, _within(name, numbers[f"export.{name}"], how(numbers[f"export.{name}"]))]
        for name, (label, how) in labels.items()
        if f"export.{name}" in numbers
    ]
    return f'<div style="margin:14px 0 18px">{page.table(["bundle", ""], rows)}</div>'


def plain(numbers: Numbers) -> str:
    """Every number by its name."""
    return page.table(["name", "value"], [[f"<code>{html.escape(n)}</code>", _plain(v)] for n, v in numbers.items()])
