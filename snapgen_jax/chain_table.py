"""The table of a chain: what each row scored, beside its baseline."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from snapgen_jax.chain import ChainConfig

Numbers = dict[str, float]
COLUMNS = {
    "params": "parameters",
    "images_seen": "images seen",
    "score.chance": "chance",
    "score.overall": "score",
    "score.seen": "seen",
    "score.heldout": "held-out",
    "frechet.distance": "Frechet",
    "diversity.pairwise": "diversity",
    "clip.score": "CLIP",
    "validation_loss.accuracy": "accuracy",
}


def table(chain: ChainConfig, rows: Mapping[str, Numbers]) -> str:
    """The rows as Markdown; in a row with a baseline, the differences from it stand in parentheses."""
    against = {row.label: row.against for stage in chain.stages for row in stage.rows}
    columns = {key: title for key, title in COLUMNS.items() if any(key in numbers for numbers in rows.values())}

    def cell(label: str, key: str) -> str:
        if key not in rows[label]:
            return ""
        value = rows[label][key]
        if key in ("params", "images_seen"):
            return f"{int(value):,}"
        if key == "score.chance":
            return f"{value:.3f}"
        other = rows.get(against.get(label, ""), {}).get(key)
        return f"{value:.3f}" + ("" if other is None else f" ({value - other:+.3f})")

    def name(label: str) -> str:
        return label + (f", against {against[label]}" if against.get(label) else "")

    lines = [["stage", *columns.values()], *[[name(label), *(cell(label, key) for key in columns)] for label in rows]]
    widths = np.max([[len(text) for text in line] for line in lines], axis=0)
    text = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])
