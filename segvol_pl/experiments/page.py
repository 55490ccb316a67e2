"""The page of a fit or a comparison: an introduction, then sections of lines, pictures and a table."""

from __future__ import annotations

from segvol_pl.html_page import Section
from segvol_pl.html_page import write_sections as write_page

__all__ = ["Section", "write_page"]
