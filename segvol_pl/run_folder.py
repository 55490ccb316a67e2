"""Reads and writes the records of a run folder without torch: metrics, place in a grid, manifest."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import socket
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from segvol_pl.atomic import write_text
from segvol_pl.hub import COMMITS

GRID_ENTRY = "grid.json"
HEADER = ["step", "metric", "value"]
VOLUMES, HELD_OUT = "data/volumes", "data/held_out"
"""Metrics: the number of volumes that a run trains on, and of held-out ones."""
SHARE = "data/share/"
"""Beginning of a metric: the share that a source has of an epoch's samples."""


def read_metrics(path: Path, metric: str) -> list[tuple[int, float]]:
    """Read (step, value) of one metric, in the order written."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(stream) if row["metric"] == metric]


def read_rows(path: Path) -> list[tuple[int, str, float]]:
    """Read all rows (step, metric, value), in the order written."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [(int(row["step"]), row["metric"], float(row["value"])) for row in csv.DictReader(stream)]


def read_every_metric(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the same of each metric, by its name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in read_rows(path):
        found.setdefault(name, []).append((step, value))
    return found


def read_grid_entry(out: Path) -> dict[str, Any] | None:
    """The record that `experiments.launch` wrote; None for a run that belongs to no grid."""
    path = out / GRID_ENTRY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_places(out: Path) -> dict[str, str]:
    """Axis of the run's grid -> label."""
    record = read_grid_entry(out)
    return dict(record["places"]) if record else {}


PACKAGES = ("segvol-pl", "torch", "lightning", "monai", "webdataset", "blosc2", "numpy", "omegaconf", "wandb")


def write_manifest(out: Path, config_yaml: str, step: int, changed: Sequence[str] = ()) -> None:
    """Write config.yaml, which reproduces the run, and manifest.json: git commit, versions, and all starts.

    Args:
        out: the run folder.
        config_yaml: the configuration as YAML.
        step: the step that this start resumes from; 0 for the first start.
        changed: how its configuration differs from that of the previous start.
    """
    path, made = out / "manifest.json", manifest()
    started = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname(), "step": step}
    before = json.loads(path.read_text(encoding="utf-8")).get("starts", []) if step and path.exists() else []
    starts = [*before, {**started, **made, "changed": list(changed)}]
    write_text(out / "config.yaml", config_yaml)
    write_text(path, json.dumps({**made, "starts": starts}, indent=2) + "\n")


def manifest() -> dict[str, Any]:
    """Git commit (with `+changes` if the working tree differs), Python and package versions, commits of hub models."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        **({"hub": dict(COMMITS)} if COMMITS else {}),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def set_aside(paths: Sequence[Path], folder: Path) -> Path | None:
    """Move the files of an earlier start to `folder`/earlier-N; return that place, None if there are no files."""
    if not paths:
        return None
    place = folder / f"earlier-{1 + len(list(folder.glob('earlier-*')))}"
    place.mkdir()
    for path in paths:
        path.rename(place / path.name)
    return place
