"""The report of a run: one HTML file that needs nothing else, and the same numbers as JSON.

It is a view of a workdir. The curves come from `metrics/*.jsonl`, the pictures from `samples/*.png`, what ran from
`run.json` and `config.json`; the numbers are given. Whatever is not there is left out, but for the required numbers.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

from etils import epath

from snapgen_jax import page as html_page
from snapgen_jax.evaluation import report_tables as tables
from snapgen_jax.evaluation.curves import Series, line_chart
from snapgen_jax.evaluation.report_tables import CATEGORIES
from snapgen_jax.training.files import write_whole
from snapgen_jax.training.metrics import read_lines

REQUIRED = (
    "minutes",
    "images_seen",
    "images_per_second",
    "params",
    "score.overall",
    "score.heldout",
    *(f"score.{category}" for category in CATEGORIES),
    "score.chance",
    "export.unet.rel_l2_f32",
    "export.flex_ops",
)
_MOST_PROGRESS_PICTURES = 4
_FALLING = ("loss", "grad_norm")  # may fall by orders of magnitude


def write_report(
    workdir: epath.PathLike, numbers: Mapping[str, float], *, title: str = "Report", prompts: Sequence[str] = ()
) -> dict[str, float | None]:
    """Writes `report.html` and `report.json` in a workdir, each whole or not at all.

    Args:
        workdir: the run, local or on object storage.
        numbers: flat names to numbers, all of `REQUIRED` among them.
        title: heading of the page.
        prompts: the texts of `samples/prompts.png`, in order.

    Returns:
        What `report.json` holds: the numbers, with None for those that are not finite.

    Raises:
        ValueError: names the required numbers that are missing or not finite, before anything is written.
    """
    wrong = [f"{n} ({numbers.get(n, 'missing')})" for n in REQUIRED if not _finite(numbers.get(n))]
    if wrong:
        raise ValueError(
            f"the report of {workdir} needs finite numbers for: {', '.join(wrong)}; run the parts that measure them "
            "(train, compositional score, export) and pass their numbers on"
        )
    workdir = epath.Path(workdir)
    plain = {name: _plain(numbers[name]) for name in sorted(numbers)}
    page = _page(workdir, {k: v for k, v in plain.items() if v is not None}, title, prompts)
    write_whole(workdir / "report.html", page)
    write_whole(workdir / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")
    return plain


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _plain(value: Any) -> float | None:
    """A Python number for any finite one, NumPy's among them, or None."""
    if not _finite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


# --- the page --------------------------------------------------------------------------------------------------------
# Every text that comes from outside (title, prompts, config, file names, metric names) passes through `html.escape`
# where it enters a tag; the template forbids scripts as well.


def _page(workdir: epath.Path, numbers: Mapping[str, float], title: str, prompts: Sequence[str]) -> str:
    sections = [
        _samples(workdir, prompts),
        _scores(workdir, numbers),
        _curves(workdir),
        _export(workdir, numbers),
        _browser(workdir),
        _details(workdir, numbers),
    ]
    return html_page.page(title, _facts(workdir), tables.tiles(numbers), sections)


def _facts(workdir: epath.Path) -> str:
    run = _read_json(workdir / "run.json")
    packages = run.get("packages", {})
    facts = {
        "machine": run.get("machine"),
        "commit": run.get("commit"),
        "python": run.get("python"),
        "jax": packages.get("jax"),
        "flax": packages.get("flax"),
    }
    return "".join(f"<span>{name} {html.escape(str(value))}</span>" for name, value in facts.items() if value)


def _picture(path: epath.Path, caption: str, alt: str = "") -> str:
    if not path.exists():
        return ""
    shown = f"<figcaption><b>{html.escape(caption)}</b></figcaption>" if caption else ""
    return f"<figure>{shown}{html_page.image(path.read_bytes(), 'png', alt or caption)}</figure>"


def _samples(workdir: epath.Path, prompts: Sequence[str]) -> str:
    folder = workdir / "samples"
    listed = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in prompts)
    progress = _progress(folder)
    pictures = [_picture(path, f"after {step:,} steps") for step, path in progress]
    return html_page.section(
        "Samples",
        "Drawn by the trained model, one image for each prompt; none is selected.",
        _picture(folder / "prompts.png", "", alt="; ".join(prompts) or "samples"),
        f'<details><summary>The prompts as text</summary><ol class="prompts">{listed}</ol></details>' if listed else "",
        f"<details><summary>While training</summary>{''.join(pictures)}</details>" if pictures else "",
    )


def _progress(folder: epath.Path) -> list[tuple[int, epath.Path]]:
    """A few of `samples_<step>.png`, evenly spread, the first and the last among them."""
    named = [(re.fullmatch(r"samples_(\d+)\.png", path.name), path) for path in _files(folder)]
    found = sorted((int(match[1]), path) for match, path in named if match)
    if len(found) <= _MOST_PROGRESS_PICTURES:
        return found
    last = len(found) - 1
    return [found[round(i * last / (_MOST_PROGRESS_PICTURES - 1))] for i in range(_MOST_PROGRESS_PICTURES)]


def _files(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _scores(workdir: epath.Path, numbers: Mapping[str, float]) -> str:
    graded = [
        _picture(workdir / "samples" / f"score_{category}.png", category.replace("_", " ")) for category in CATEGORIES
    ]
    shown = "".join(graded)
    return html_page.section(
        "Compositional score",
        "Share of images that show just what their prompt asks for, on fixed prompts in the categories of GenEval. "
        "Half of the prompts say combinations that training never showed (held out).",
        tables.scores(numbers),
        f"<details><summary>Every image, passes in green and failures in red</summary>{shown}</details>"
        if shown
        else "",
        tables.detector(numbers),
        tables.distances(numbers),
    )


def _curves(workdir: epath.Path) -> str:
    train = read_lines(workdir / "metrics" / "train.jsonl")
    evaluation = read_lines(workdir / "metrics" / "evaluation.jsonl")
    perf = read_lines(workdir / "metrics" / "perf.jsonl")
    losses = [name for name in _names(evaluation) if name.startswith("validation_loss.")]
    by_time = [name for name in losses if "=" in name]
    charts = [_chart(train, name, axis="auto") for name in _names(train, first="loss") if name in _FALLING]
    charts += [
        line_chart(
            "validation loss by timestep",
            [_series(evaluation, name, name.removeprefix("validation_loss.")) for name in by_time],
            axis="auto",
            ordered=True,
        )
    ]
    charts += [_chart(evaluation, name, axis="auto") for name in losses if name not in by_time]
    charts += [_chart(train, name) for name in _names(train) if name not in _FALLING]
    charts += [_chart(perf, name) for name in ("examples_per_second", "data_wait_share")]
    shown = "".join(charts)
    text = "Lines are means over an interval, shades hold nine of ten of its values. The records are metrics/*.jsonl."
    return html_page.section("Training", text, f'<div class="charts">{shown}</div>' if shown else "")


def _chart(records: Sequence[Mapping[str, Any]], name: str, axis: Literal["linear", "auto"] = "linear") -> str:
    return line_chart(re.sub("[._]", " ", name), [_series(records, name)], axis=axis)


def _names(records: Sequence[Mapping[str, Any]], first: str = "") -> list[str]:
    """Names of the numbers in some records, in order of appearance, `first` before all."""
    names = dict.fromkeys(
        name
        for record in records
        for name, value in record.items()
        if name != "step" and isinstance(value, float | int) and not isinstance(value, bool)
    )
    return sorted(names, key=lambda name: name != first)


def _series(records: Sequence[Mapping[str, Any]], name: str, label: str = "") -> Series:
    points = [(r["step"], r[name]) for r in records if _finite(r.get(name))]
    return Series(label or name, [x for x, _ in points], [y for _, y in points])


def _export(workdir: epath.Path, numbers: Mapping[str, float]) -> str:
    return html_page.section(
        "Export",
        "TFLite files on LiteRT against JAX: relative L2 distance of the outputs, the largest over the times tried.",
        tables.export_units(numbers),
        tables.export_totals(numbers),
        _picture(workdir / "samples" / "bundle.png", "drawn by the exported files"),
    )


def _browser(workdir: epath.Path) -> str:
    """How to open the browser app, where the run has one."""
    program = workdir / "export" / "web" / "serve.py"
    if not program.exists():
        return ""
    command = html.escape(f"python3 {shlex.quote(os.fspath(program))}")
    return html_page.section(
        "Draw in your browser",
        "A page that draws with the exported files, on the device that opens it: a laptop, or a phone. Run this "
        "command, then open the address that it prints.",
        f"<pre>{command}</pre>",
        '<p><a href="http://localhost:8000/">http://localhost:8000/</a></p>',
    )


def _details(workdir: epath.Path, numbers: Mapping[str, float]) -> str:
    config = _read_json(workdir / "config.json")
    text = html.escape(json.dumps(config, indent=2)) if config else ""
    return html_page.section(
        "Details",
        "All numbers of report.json, and the config of the run.",
        f"<details><summary>Numbers</summary>{tables.plain(numbers)}</details>",
        f"<details><summary>Config</summary><pre>{text}</pre></details>" if text else "",
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
