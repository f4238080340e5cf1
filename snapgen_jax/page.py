"""An HTML page that needs no other file: how every report looks. It runs no script and loads nothing.

Cells, tiles and sections are HTML already: whoever makes them escapes each text that comes from outside.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import string
from collections.abc import Sequence
from typing import Literal


def page(title: str, facts: str, tiles: str, sections: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: plain text.
        facts: HTML of the line below the title.
        tiles: HTML of the headline numbers, as from `tile`.
        sections: as from `section`; empty ones are left out.
    """
    template = importlib.resources.files("snapgen_jax").joinpath("page.html")
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), facts=facts, tiles=tiles, sections="\n".join(filter(None, sections))
    )


def section(heading: str, text: str, *parts: str) -> str:
    """A card with a heading and a plain text above some HTML; "" where no part has content."""
    body = "\n".join(filter(None, parts))
    return f"<section><h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{body}</section>" if body else ""


def tile(value: str, name: str, first: bool = False) -> str:
    """One headline number, both as plain text."""
    kind = "tile first" if first else "tile"
    return f'<div class="{kind}"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'


def image(data: bytes, kind: Literal["png", "jpeg"], described: str) -> str:
    """A picture within the page.

    Args:
        data: the bytes of its file.
        kind: of the file.
        described: plain text in place of the picture.
    """
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(described, quote=True)}" src="data:image/{kind};base64,{encoded}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], first_is_whole: bool = False) -> str:
    """Cells are HTML already. The first column is left-aligned; a cell that begins with a tag fills its column."""

    def row(cells: Sequence[str], number: int) -> str:
        kind = ' class="whole"' if first_is_whole and number == 0 else ""
        classes = [
            "" if i == 0 else ' class="wide"' if c.startswith("<div") else ' class="n"' for i, c in enumerate(cells)
        ]
        return f"<tr{kind}>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(classes, cells, strict=True)) + "</tr>"

    wide = {i for cells in rows for i, cell in enumerate(cells) if cell.startswith("<div")}
    names = "".join(
        f"<th{'' if i == 0 or i in wide else ' class=n'}>{html.escape(name)}</th>" for i, name in enumerate(head)
    )
    body = "".join(row(cells, number) for number, cells in enumerate(rows))
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
