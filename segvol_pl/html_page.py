"""HTML pages that need no other file, made from the templates in `segvol_pl/templates`.

Templates escape what they are given (jinja2's autoescape). Pictures stand in the page as data.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from segvol_pl.atomic import write_text

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("segvol_pl"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")


def write_page(path: Path, template: str, **content: Any) -> None:
    """Write a page.

    Args:
        path: The file to write.
        template: Name of a file in `segvol_pl/templates`.
        content: Values of the template's variables.
    """
    write_text(path, ENVIRONMENT.get_template(template).render(content))


@dataclass(frozen=True)
class Section:
    """A part of a page of sections. What is empty is left out."""

    heading: str = ""
    lines: list[tuple[str, str]] = field(default_factory=list)
    """Text and its kind: `yes` and `no` for verdicts, `note` for cautions."""
    pictures: list[tuple[bytes, str]] = field(default_factory=list)
    """PNG, and the text that describes it."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """Rows of a table, all with the same columns."""
    texts: bool = False
    """Whether the cells are sentences instead of numbers."""


def write_sections(path: Path, title: str, about: str, sections: Sequence[Section]) -> None:
    """Write a page of sections; `about` is its introduction."""
    write_page(path, "scaling.html.j2", title=title, about=about, sections=sections)
