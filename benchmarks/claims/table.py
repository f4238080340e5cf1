"""One table over all papers: a claim's row says what was compared and what it shows, or the hours that it needs.

A paper's record `<out>/<paper>.json` is judged from its landed files; `<out>/table.md` is all records as Markdown.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import landing
from benchmarks.claims.claim import DIVERSITY, FRECHET, HELD_OUT, SCORE, Claim, Metric
from benchmarks.claims.landing import Landed
from benchmarks.claims.trials import Paper

PLACES = {SCORE, HELD_OUT, FRECHET, DIVERSITY}


# --- judging ---------------------------------------------------------------------------------------------------------


def record(paper: Paper, out: pathlib.Path) -> dict[str, Any]:
    """All that is known of a paper: each claim judged by the first group of landed files that has its rows."""
    found = {group: landing.read_all(out / paper.name / group) for group in landing.groups(out, paper.name)}
    rows = {group: landing.rows(landed, paper) for group, landed in found.items()}
    lines = []
    for claim in paper.claims:
        group = next((group for group in rows if not claim.missing(rows[group])), None)
        if group is None:
            lines.append(_not_run(claim, paper, rows, found))
        else:
            lines.append({**claim.judge(rows[group], paper.metrics), "group": group})
    return {
        "paper": paper.name,
        "claims": lines,
        "columns": {key: [metric.title, metric.digits] for key, metric in paper.metrics.items()},
        "groups": {group: _group(landed, rows[group], paper) for group, landed in found.items()},
    }


def _not_run(
    claim: Claim, paper: Paper, rows: Mapping[str, landing.Rows], found: Mapping[str, Sequence[Landed]]
) -> dict[str, Any]:
    """The line of a claim whose rows are not there, with the budget and the hours that make them."""
    budget, trials = paper.budgets_of(claim)[0], paper.trials_of(claim)
    hours = hours_of(paper, budget, trials, found.get(budget, ()))
    missing = claim.missing(rows.get(budget, {}))
    status = f"not run (needs {max(hours, 0.1):.1f} h)"
    return {"claim": claim.claim, "control": claim.control, "status": status, "missing": missing, "budget": budget}


def hours_of(paper: Paper, budget: str, trials: Sequence[str], landed: Sequence[Landed] = ()) -> float:
    """Hours of the trainings that are not landed yet, with those that they start from."""
    there = {(one.trial, one.seed) for one in landed}
    wanted = {name: {seed for seed in paper.seeds(name, budget) if (name, seed) not in there} for name in trials}
    for name in reversed(trials):
        for other in paper.trials[name].earlier.values():
            wanted[other] |= set(paper.seeds(other, budget)) if wanted[name] else set()
    for name, trial in paper.trials.items():  # a base that nothing missing starts from is no row of its own
        followed = any(wanted[n] for n in trials if name in paper.trials[n].earlier.values())
        if name in wanted and not trial.draws and not followed:
            wanted[name] = set()
    return sum(paper.trials[name].seconds(budget) * len(seeds) for name, seeds in wanted.items()) / 3600


def _group(landed: Sequence[Landed], rows: landing.Rows, paper: Paper) -> dict[str, Any]:
    """Rows as means and spreads over seeds, and where they are from."""
    once = {row for name, trial in paper.trials.items() if trial.shared for row in trial.rows(name).values()}
    order = [row for row in paper.makers() if row in rows]
    summaries = {row: _summary(list(rows[row].values())[: 1 if row in once else None], paper.metrics) for row in order}
    totals = {one.total_minutes for one in landed if one.minutes is None and one.total_minutes is not None}
    return {
        "rows": summaries,
        "machines": sorted({one.machine for one in landed}),
        "commits": sorted({one.commit for one in landed}),
        "minutes": sum(one.minutes or 0 for one in landed) + sum(totals),
    }


def _summary(seeds: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    summary: dict[str, Any] = {"seeds": len(seeds)}
    for key in metrics:
        values = np.array([numbers[key] for numbers in seeds if key in numbers])
        if len(values):
            summary[key] = float(values.mean())
        if len(values) > 1 and (key in PLACES or values.std() > 0):
            summary[f"{key}.spread"] = float(values.std(ddof=1))
    return summary


# --- Markdown --------------------------------------------------------------------------------------------------------


def write(papers: Sequence[Paper], out: pathlib.Path) -> str:
    """Judges papers, keeps their records, and writes the table of all records that are there; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    for paper in papers:
        (out / f"{paper.name}.json").write_text(json.dumps(record(paper, out), indent=2) + "\n")
    text = markdown([json.loads(path.read_text()) for path in sorted(out.glob("*.json"))])
    (out / "table.md").write_text(text)
    return text


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The claims of all papers, then the rows that they are judged by and where those are from."""
    lines = ["| paper | claim | seen | status | from |", "|---|---|---|---|---|"]
    lines += [_claim_line(one["paper"], claim) for one in records for claim in one["claims"]]
    for one in records:
        for group, found in one["groups"].items():
            lines += ["", f"## {one['paper']}, {group}", "", *_rows_table(found["rows"], one["columns"]), ""]
            lines += [f"{found['minutes']:.0f} minutes of training. Machines: {'; '.join(found['machines'])}."]
            lines += [f"Commits: {', '.join(found['commits'])}."]
    return "\n".join(lines) + "\n"


def _claim_line(paper: str, claim: Mapping[str, Any]) -> str:
    name = f"control, must fail: {claim['claim']}" if claim["control"] else claim["claim"]
    if "budget" in claim:
        seen, source = f"`python -m benchmarks.claims {paper} --budget={claim['budget']}` makes it", ""
    else:
        seen, source = "; ".join(_seen(part) for part in claim["parts"]), claim["group"]
    status = claim["status"]
    if claim["control"] and status == "shown":
        status = "shown, but must fail: the measure sees nothing"
    return f"| {paper} | {name} | {seen} | {status} | {source} |"


def _seen(part: Mapping[str, Any]) -> str:
    digits = part["digits"]
    text = f"{part['compared']} = {part['mean']:+.{digits}f}"
    if part["over"] == "exact":
        text = f"{part['compared']} = {part['mean']:.2f}"
    elif part["low"] is None:
        text += ", one number, no bound"
    else:
        text += f", above {part['low']:+.{digits}f} over {_sample(part)}"
    return text + (f", needs {part['needs']}" if "needs" in part else "")


def _sample(part: Mapping[str, Any]) -> str:
    seeds = f"{part['seeds']} seed{'s' if part['seeds'] > 1 else ''}"
    return f"{seeds} of {part['prompts']} prompts" if part["prompts"] else seeds


def _rows_table(rows: Mapping[str, Mapping[str, Any]], titles: Mapping[str, Sequence[Any]]) -> list[str]:
    columns = {key: title for key, title in titles.items() if any(key in row for row in rows.values())}
    header = ["run", *(title for title, _ in columns.values()), "seeds"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        cells = []
        for key, (_, digits) in columns.items():
            spread = f" ± {row[f'{key}.spread']:.{digits}f}" if f"{key}.spread" in row else ""
            cells.append(f"{row[key]:,.{digits}f}{spread}" if key in row else "")
        lines.append(f"| {' | '.join([name, *cells, str(row['seeds'])])} |")
    return lines
