"""Links from a page to a file of the repository, for the site.

In the repository such a link opens the file. On the site

1. one to a module of the package opens its API page,
2. one to any other file opens a copy of it, as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

UPWARDS = re.compile(r"\]\((?P<target>\.\./[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
COPIES = "repository"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to. Raises OSError for a file that does not exist."""
    root = Path(config.config_file_path).parent
    linked = {
        path
        for file in files.documentation_pages()
        for found in UPWARDS.finditer(file.content_string)
        if (path := outside(found["target"], file.src_uri)) and module_of(path) is None
    }
    for path in sorted(linked):
        files.append(File.generated(config, copy_of(path), content=(root / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "highlight.css", content=HtmlFormatter().get_style_defs(".highlight")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page's text with these links changed."""

    def changed(found: re.Match[str]) -> str:
        path = outside(found["target"], page.file.src_uri)
        if path is None:
            return found[0]
        if (module := module_of(path)) is not None:
            return f"][{module}]"
        return f"]({posixpath.relpath(copy_of(path), posixpath.dirname(page.file.src_uri))})"

    return UPWARDS.sub(changed, markdown)


def outside(target: str, page: str) -> str | None:
    """Return the repository path of a link, or None if the link stays in docs/.

    Args:
        target: the link, relative to its page.
        page: the page's path in docs/.
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def module_of(path: str) -> str | None:
    """Return the dotted name of a module of the package, or None for any other file."""
    if not path.startswith("segvol_pl/") or not path.endswith(".py"):
        return None
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def copy_of(path: str) -> str:
    """Return where on the site the text of a file lies."""
    return f"{COPIES}/{path}.txt"
