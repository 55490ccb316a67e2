"""An HTML file that needs nothing else, and what such pages are made of."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from segvol_pl.atomic import write_text


def write_page(path: Path, title: str, style: str, parts: Iterable[str]) -> None:
    """A page of HTML parts. style: CSS."""
    write_text(path, PAGE.format(title=escape(title), style=style, body="\n".join(parts)))


def picture(png: bytes, text: str) -> str:
    """HTML of a PNG, inline; `text` stands for it where it is not shown."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML of a table; head and cells are HTML."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
