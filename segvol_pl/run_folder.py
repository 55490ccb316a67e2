"""What a run folder tells without torch: the rows of `metrics.csv`, and its places in its grid."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

RECORD = "grid.json"
HEADER = ["step", "metric", "value"]
VOLUMES, HELD_OUT = "data/volumes", "data/held_out"
"""Metrics that state how many volumes a run trains on, and is held against."""


def read_metrics(path: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, in the order written."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(stream) if row["metric"] == metric]


def read_record(out: Path) -> dict[str, Any] | None:
    """What the grid wrote of the run, see `launch`; none for a run of no grid."""
    path = out / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_places(out: Path) -> dict[str, str]:
    """Axis of the run's grid -> label."""
    record = read_record(out)
    return dict(record["places"]) if record else {}
