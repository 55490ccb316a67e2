"""What `gpu.py` writes and shows: figures, a JSON line each, and Markdown tables of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIGURES = "figures.jsonl"
FAILED = "failed"
"""The name of a figure that says why there is no other."""
CLOCK = "clock"
"""The name of a stage's last figure: its seconds."""


@dataclass(frozen=True)
class Figure:
    """One line. `value` is a number, or text where there is none."""

    stage: str
    name: str
    value: float | int | str
    unit: str
    card: str
    settings: dict[str, Any] = field(default_factory=dict)
    date: str = ""


def append(out: Path, figure: Figure) -> None:
    """Writes the line at once, whole."""
    line = json.dumps(asdict(figure)) + "\n"
    with (out / FIGURES).open("a", encoding="utf-8") as stream:
        stream.write(line)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read(out: Path) -> list[Figure]:
    """All lines, in the order written; none where there is no file."""
    path = out / FIGURES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Figure(**json.loads(line)) for line in lines]


# ---- tables ----


def tables(figures: Iterable[Figure]) -> str:
    """Markdown: for each stage, as it ran last, a row for each setting and a column for each figure."""
    stages: dict[str, list[Figure]] = {}
    ended: set[str] = set()
    for one in figures:
        if one.stage not in stages or one.stage in ended:
            stages[one.stage] = []
        stages[one.stage].append(one)
        (ended.add if one.name == CLOCK else ended.discard)(one.stage)
    cards = dict.fromkeys(one.card for found in stages.values() for one in found)
    parts = [f"Card: {', '.join(cards)}."]
    for stage, found in stages.items():
        parts.append(f"### {stage}\n\n" + table({(label(one.settings), one.name): one for one in found}))
    return "\n\n".join(parts) + "\n"


def table(found: dict[tuple[str, str], Figure]) -> str:
    """One stage's; what has no settings stands below, as a list."""
    rows = list(dict.fromkeys(row for row, _ in found))
    columns = list(dict.fromkeys(name for row, name in found if row))
    lines = []
    if columns:
        units = {name: next(one.unit for (_, of), one in found.items() if of == name) for name in columns}
        head = [f"{name}, {units[name]}" if units[name] not in ("", name) else name for name in columns]
        lines += ["| settings | " + " | ".join(head) + " |", "|---|" + "---:|" * len(columns)]
        for row in filter(None, rows):
            cells = [shown(found[row, name].value) if (row, name) in found else "" for name in columns]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"- {name}: {shown(one.value)} {one.unit}".rstrip() for (row, name), one in found.items() if not row]
    return "\n".join(lines).strip()


def label(settings: dict[str, Any]) -> str:
    """`step SimMIM, precision bf16`."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
