"""`report.html` of a collection: what was kept, what was rejected and why, with pictures."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

from snapgen_jax import page
from snapgen_jax.data.errors import DataError
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.inspection import MEANINGS, THUMBNAIL, Candidate, thumbnail
from snapgen_jax.preparation.places import Place, PlaceReader

_LONGEST = 300  # characters of a caption that are shown
_CARD = f"display:inline-block;vertical-align:top;margin:0 14px 14px 0;max-width:{2 * THUMBNAIL + 14}px"


class _Outcome(Protocol):
    """See `snapgen_jax.preparation.collect.Outcome`."""

    @property
    def counts(self) -> Mapping[str, int]: ...
    @property
    def examples(self) -> Mapping[str, Sequence[Candidate]]: ...
    @property
    def sizes(self) -> Mapping[int, int]: ...
    @property
    def captions(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def rejected(self) -> Mapping[str, int]: ...


def report(config: CollectConfig, outcome: _Outcome) -> str:
    """The page, whole. Every text of the source is escaped."""
    read = sum(outcome.counts.values())
    tiles = [
        page.tile(f"{outcome.kept:,}", "images kept", first=True),
        page.tile(f"{read:,}", "images read"),
        page.tile(f"{read - outcome.kept:,}", "images rejected"),
        page.tile(f"{outcome.captions / max(outcome.kept, 1):.3g}", "captions an image"),
    ]
    facts = "".join(f"<span>{html.escape(f'{n} {v}')}</span>" for n, v in _facts(config).items() if v)
    reader = PlaceReader()
    sections = [
        page.section("Counts", "An image counts for the first reason that applies.", _counts(outcome, read)),
        page.section("Sizes", "Kept images by their shorter side, in pixels.", _sizes(outcome.sizes)),
        *(
            page.section(
                f"Rejected: {reason}",
                f"{outcome.counts[reason]:,} images: {_meaning(reason)}.",
                "".join(_card(candidate, reader) for candidate in outcome.examples.get(reason, ())),
            )
            for reason in outcome.rejected
            if config.examples_shown
        ),
        page.section(
            "Kept",
            "The first few by id.",
            "".join(_card(c, reader) for c in outcome.examples.get("", ())) if config.examples_shown else "",
        ),
        page.section("Details", "What was asked for.", f"<pre>{html.escape(_config(config))}</pre>"),
    ]
    reader.close()
    return page.page("Collected images", facts, "".join(tiles), sections)


def _facts(config: CollectConfig) -> dict[str, str]:
    return {"source": config.source, "path": config.path, "name": config.name}


def _config(config: CollectConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def _meaning(reason: str) -> str:
    return MEANINGS["column" if reason.startswith("column ") else reason]


def _counts(outcome: _Outcome, read: int) -> str:
    rows = [["kept", "", f"{outcome.kept:,}", f"{outcome.kept / read:.2%}"]]
    rows += [
        [html.escape(reason), html.escape(_meaning(reason)), f"{count:,}", f"{count / read:.2%}"]
        for reason, count in outcome.rejected.items()
    ]
    return page.table(["", "meaning", "images", "share"], rows, first_is_whole=True)


def _sizes(sizes: Mapping[int, int]) -> str:
    most = max(sizes.values(), default=1)
    rows = []
    for size in sorted(sizes):
        bar = f'<div class="track"><i class="bar" style="width:{100 * sizes[size] / most:.1f}%"></i></div>'
        rows.append([f"{size:,} to {2 * size - 1:,}", bar, f"{sizes[size]:,}"])
    return page.table(["pixels", "", "images"], rows)


def _card(candidate: Candidate, reader: PlaceReader) -> str:
    """One example: its picture, beside that of what it duplicates, and what is known of it."""
    pictures = [candidate.thumbnail or _thumbnail(candidate.place, reader), _thumbnail(candidate.twin, reader)]
    shown = "".join(page.image(data, "jpeg", candidate.id) for data in pictures if data)
    texts = [text for text, _ in candidate.captions if text]
    size = f"{candidate.width} x {candidate.height} px" if candidate.width else ""
    detail = f"of {candidate.detail}" if candidate.twin else candidate.detail
    lines = [candidate.id, size if size not in detail else "", detail, *(text[:_LONGEST] for text in texts[:3])]
    if len(texts) > 3:
        lines.append(f"and {len(texts) - 3} captions more")
    said = "<br>".join(html.escape(line) for line in lines if line)
    return (
        f'<figure style="{_CARD}"><div style="display:flex;gap:8px">{shown}</div>'
        f'<figcaption style="display:block;overflow-wrap:anywhere">{said}</figcaption></figure>'
    )


def _thumbnail(place: Place | None, reader: PlaceReader) -> bytes:
    if place is None:
        return b""
    try:
        return thumbnail(reader.read(place))
    except DataError:  # the page has a picture less
        return b""
