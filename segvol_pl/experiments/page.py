"""The page of a fit or a comparison: an introduction, then sections of lines, pictures and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segvol_pl import html_page


@dataclass(frozen=True)
class Section:
    """A part of the page. What is empty is left out."""

    heading: str = ""
    lines: list[tuple[str, str]] = field(default_factory=list)
    """Text and its kind: `yes` and `no` for verdicts, `note` for cautions."""
    pictures: list[tuple[bytes, str]] = field(default_factory=list)
    """PNG, and the text that describes it."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """Rows of a table, all with the same columns."""


def write_page(path: Path, title: str, about: str, sections: Sequence[Section]) -> None:
    """Write the page; `about` is its introduction."""
    html_page.write_page(path, "scaling.html.j2", title=title, about=about, sections=sections)
