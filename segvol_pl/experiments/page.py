"""The page of a fit or a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from segvol_pl import html_page
from segvol_pl.html_page import picture as picture


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """A page of parts made by the functions below."""
    html_page.write_page(path, title, STYLE, [f"<h1>{escape(title)}</h1>", *parts])


def heading(text: str) -> str:
    """HTML of a heading."""
    return f"<h2>{escape(text)}</h2>"


def lines(texts: Iterable[str], kind: str = "") -> str:
    """HTML of paragraphs of the class `kind`."""
    return "".join(f'<p class="{kind}">{escape(text)}</p>' for text in texts)


def table(rows: Sequence[dict[str, str]]) -> str:
    """HTML of rows that have the same columns, the names of which are the first row's."""
    return html_page.table(
        [escape(name) for name in rows[0]], ([escape(cell) for cell in row.values()] for row in rows)
    )


STYLE = """
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem; color: #1d2430; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; padding-top: 1rem; border-top: 1px solid #dde1e7; }
p { margin: .3rem 0 .6rem; } .no { background: #fdf0ee; border-left: 3px solid #c03d5d; padding: .45rem .8rem; }
.yes { background: #eef8f1; border-left: 3px solid #2e9e5b; padding: .45rem .8rem; }
.note { background: #f5f7f9; border-left: 3px solid #8a93a0; padding: .45rem .8rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #dde1e7; white-space: nowrap; }
th { color: #5c6675; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
img { max-width: 100%; width: 36rem; display: block; margin: .6rem 0; }
"""
