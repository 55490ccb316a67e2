"""Where metrics go: metrics.csv always, wandb as configured; and the manifest of a run."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from segvol_pl.config import TrackConfig, Wandb
from segvol_pl.data.whole import replacing, write_text

HEADER = ["step", "metric", "value"]
PACKAGES = ("segvol-pl", "torch", "lightning", "monai", "webdataset", "blosc2", "numpy", "omegaconf", "wandb")


class MetricsFile(Logger):
    """`metrics.csv`: one row per step and metric, appended, so that it survives a kill and a resume.

    `after` is the step that the run goes on from: later rows, of steps that will be done again, are dropped.
    """

    def __init__(self, path: Path, after: int) -> None:
        super().__init__()
        self.path = path
        self._start(after)

    @rank_zero_only
    def _start(self, after: int) -> None:
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as stream:
                rows = [
                    row for row in csv.reader(stream) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= after
                ]
        with replacing(self.path) as part, part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([HEADER, *rows])

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is written by `write_manifest`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([step, name, value] for name, value in metrics.items() if name != "epoch")


def read_metrics(path: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, in the order written."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(stream) if row["metric"] == metric]


def loggers(out: Path, track: TrackConfig, after: int) -> list[Logger]:
    """metrics.csv, and wandb unless it is disabled. Without a key, wandb writes offline runs to sync later."""
    made: list[Logger] = [MetricsFile(out / "metrics.csv", after)]
    if track.wandb is not Wandb.disabled:
        # wandb reads this once, at its first call; its summary repeats metrics.csv.
        os.environ.setdefault("WANDB_SILENT", "true")
        offline = track.wandb is Wandb.offline or (track.wandb is Wandb.auto and not _has_key())
        name = track.name or out.name
        mode = "offline" if offline else "online"
        made.append(WandbLogger(project=track.project, name=name, group=track.group, save_dir=out, mode=mode))
    return made


def finish(made: list[Logger]) -> None:
    """Ends the wandb run: one process may do several runs, and each is its own."""
    for logger in made:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _has_key() -> bool:
    import wandb

    return bool(wandb.login(prompt=False))


@rank_zero_only
def write_manifest(out: Path, config_yaml: str) -> None:
    """config.yaml (running it again reproduces the run) and manifest.json (git commit, versions)."""
    write_text(out / "config.yaml", config_yaml)
    write_text(out / "manifest.json", json.dumps(manifest(), indent=2) + "\n")


def manifest() -> dict[str, Any]:
    """Git commit (with `+changes` where the tree differs), Python and package versions."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
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
