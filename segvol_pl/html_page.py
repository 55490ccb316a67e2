"""HTML pages that need no other file, made from the templates in `segvol_pl/templates`.

Templates escape what they are given (jinja2's autoescape). Pictures stand in the page as data.
"""

from __future__ import annotations

import base64
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
