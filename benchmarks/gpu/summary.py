"""The table of one run, in Markdown, from the lines that it stored."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.rows import ROWS, Row

Line = dict[str, Any]
HEADER = (
    "work",
    "ours",
    "PyTorch",
    "PyTorch / ours",
    "share of the matmul rate",
    "compile, cold and warm",
    "peak memory",
)


def read(path: pathlib.Path, run: str = "") -> list[Line]:
    """The lines of one run in a file, of the last one by default; a line that was cut off is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    run = run or (lines[-1]["run"] if lines else "")
    return [line for line in lines if line["run"] == run]


def table(lines: Sequence[Line]) -> str:
    """A row for each measurement that was tried; ratios are of times in this one run."""
    if not lines:
        return "nothing was measured\n"
    ours = next((line["versions"] for line in lines if line.get("framework") == "jax" and "versions" in line), {})
    theirs = next((line["versions"] for line in lines if line.get("framework") == "torch" and "versions" in line), {})
    versions = ", ".join(f"{name} {version}" for name, version in {**theirs, **ours}.items())
    text = [f"{lines[0]['card']}, commit {lines[0]['commit']}, run of {lines[0]['run']}, {versions}", ""]
    text += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for row in ROWS:
        of_row = [line for line in lines if line["row"] == row.name]
        if of_row:
            text.append(f"| {' | '.join(_cells(row, of_row))} |")
    return "\n".join(text) + "\n"


def _cells(row: Row, lines: Sequence[Line]) -> Iterable[str]:
    ours, theirs = ([line for line in lines if line["framework"] == side] for side in ("jax", "torch"))
    best_ours, best_theirs = _best(ours), _best(theirs)
    ratio = f"**{best_theirs['ms'] / best_ours['ms']:.2f}**" if best_ours and best_theirs else ""
    return (
        row.title,
        _time(ours),
        _time(theirs),
        ratio,
        _pair(best_ours, best_theirs, "share_of_matmul", "{:.0%}"),
        _compilation(ours, theirs),
        _pair(_measured(ours), _measured(theirs), "peak_gb", "{:.1f} GB"),
    )


def _time(lines: Sequence[Line]) -> str:
    """Milliseconds of the fastest form, the others in brackets; or why there is none."""
    timed = sorted((line for line in lines if "ms" in line), key=lambda line: line["ms"])
    if not timed:
        said = [line.get("error") or line.get("skipped", "") for line in lines]
        return (
            f"failed: {said[0][:80]}".replace("|", "/").replace("\n", " ")
            if said and lines[0].get("error")
            else "".join(said)
        )
    texts = [f"{line['ms']:.4g} ms" + (f", {line['form']}" if line.get("form") else "") for line in timed]
    return texts[0] + (f" ({'; '.join(texts[1:])})" if texts[1:] else "")


def _best(lines: Sequence[Line]) -> Line | None:
    return min((line for line in lines if "ms" in line), key=lambda line: line["ms"], default=None)


def _measured(lines: Sequence[Line]) -> Line | None:
    return next((line for line in lines if "peak_gb" in line), None)


def _pair(ours: Line | None, theirs: Line | None, name: str, form: str) -> str:
    texts = [form.format(line[name]) if line and name in line else "-" for line in (ours, theirs)]
    return "" if texts == ["-", "-"] else ", ".join(texts)


def _compilation(ours: Sequence[Line], theirs: Sequence[Line]) -> str:
    texts = []
    for lines in (ours, theirs):
        found = next((line for line in lines if "compile_cold_s" in line), None)
        texts.append(f"{found['compile_cold_s']:.0f} s, {found['compile_warm_s']:.0f} s" if found else "-")
    return "" if texts == ["-", "-"] else "; ".join(texts)
