"""Links from a page to a file of the repository, for the site.

In the repository such a link opens the file. On the site

1. one to a module of the package opens its API page,
2. one to any other file opens a copy of it, as text.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

OUTSIDE = re.compile(r"\]\(\.\./(?P<path>[^)#\s]+)\)")
"""Pages lie side by side in docs/, so that a link out of it begins with `../`."""
COPIES = "repository"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to. Raises OSError for one that is not there."""
    root = Path(config.config_file_path).parent
    linked = {found["path"] for file in files.documentation_pages() for found in OUTSIDE.finditer(file.content_string)}
    for path in sorted(path for path in linked if _module(path) is None):
        files.append(File.generated(config, _copy(path), content=(root / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "highlight.css", content=HtmlFormatter().get_style_defs(".highlight")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with such links changed."""
    return OUTSIDE.sub(lambda found: _target(found["path"]), markdown)


def _target(path: str) -> str:
    module = _module(path)
    return f"]({_copy(path)})" if module is None else f"][{module}]"


def _module(path: str) -> str | None:
    """The dotted name of a file of the package."""
    if not path.startswith("segvol_pl/") or not path.endswith(".py"):
        return None
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _copy(path: str) -> str:
    return f"{COPIES}/{path}.txt"
