"""Figures of a benchmark, kept with what they were measured on: benchmarks/results/NAME.json.

A figure that a document quotes can so be traced to a commit, a processor and the versions of the libraries. No host
name is written.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from segvol_pl.atomic import write_text
from segvol_pl.run_folder import manifest

FOLDER = Path(__file__).parent / "results"
CPU_INFO = Path("/proc/cpuinfo")


def record(name: str, figures: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write figures to `folder/NAME.json`, in place of those of the run before.

    Args:
        name: The script's, without its ending.
        figures: Name with unit -> value, as `{"stall_s": 0.12}`.
        folder: Where to write.

    Returns:
        The file.
    """
    path = folder / f"{name}.json"
    measured = {"figures": dict(figures), "date": f"{datetime.now(UTC):%Y-%m-%d}", "host": host(), **manifest()}
    write_text(path, json.dumps(measured, indent=2) + "\n")
    return path


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    right: bool = True
    """Whether its cells are aligned on the right, as numbers are."""


def markdown(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    head = "| " + " | ".join(column.name for column in columns) + " |"
    rule = "|" + "|".join("---:" if column.right else "---" for column in columns) + "|"
    return [head, rule, *("| " + " | ".join(row) + " |" for row in rows)]


def write_between(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the markers `name` of a page, in place of what is there.

    Raises:
        ValueError: the page has no such markers.
    """
    start, end = (f"<!-- --8<-- [{which}:{name}] -->\n" for which in ("start", "end"))
    before, found, rest = path.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path}: no lines {start.strip()} and {end.strip()}: add them where the table belongs")
    write_text(path, before + start + "\n".join(lines) + "\n" + end + after)


def host() -> dict[str, Any]:
    """Processor, usable cores and system."""
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()}


def _processor() -> str:
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
