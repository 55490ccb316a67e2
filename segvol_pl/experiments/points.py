"""Where the points of a fit come from: run folders, a table, or runs at wandb.

1. A run folder gives N by its configuration's architecture, D by steps x global batch (or the volumes it trained on),
   training FLOPs by the model's arithmetic, and the loss by any metric of `metrics.csv`, or any number in a JSON file.
2. A CSV gives params, samples and loss by its columns.
3. A run at wandb gives the same by its configuration and summary.

What cannot be used is listed with the reason, never dropped in silence.
"""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl.config import DataCount, MetricPick, PointsConfig, loader
from segvol_pl.errors import ConfigError, PointsError
from segvol_pl.experiments.grid import parameters, volume_flops
from segvol_pl.run_folder import VOLUMES, read_grid_entry, read_metrics

WANDB = "wandb:"
LOSS = "loss"
"""The table's column."""


@dataclass(frozen=True)
class Point:
    """One run as a fit sees it."""

    name: str
    params: float
    samples: float
    loss: float
    flops: float | None = None
    """Training FLOPs of the whole run."""
    places: dict[str, str] = field(default_factory=dict)
    """Axis of its grid -> label."""


@dataclass(frozen=True)
class Points:
    """What was gathered, and what could not be used, with reasons."""

    used: list[Point]
    unused: dict[str, str]
    loss: str
    """What the loss is, in words."""
    samples: str
    """What D counts."""

    def logs(self, variables: Sequence[str]) -> np.ndarray:
        """(R,T): natural logs of the variables."""
        return np.log([[getattr(point, variable) for variable in variables] for point in self.used])

    @property
    def left_out(self) -> list[str]:
        """What could not be used, a line each."""
        return [f"left out {name}: {why}" for name, why in self.unused.items()]

    @property
    def losses(self) -> np.ndarray:
        """Of the points that are used, in their order."""
        return np.array([point.loss for point in self.used])


def gather(config: PointsConfig) -> Points:
    """All points that the configuration names. Raises PointsError where there is none, ConfigError for bad keys."""
    used: list[Point] = []
    unused: dict[str, str] = {}
    if config.table is not None:
        used += _table(Path(config.table), config)
    for place in (run for run in config.runs if run.startswith(WANDB)):
        _at_wandb(place.removeprefix(WANDB), config, used, unused)
    for folder in _folders([run for run in config.runs if not run.startswith(WANDB)]):
        try:
            used.append(_folder(folder, config))
        except PointsError as error:
            unused[str(folder)] = str(error)
    metric = metric_of(config)
    if not used:
        first = "; ".join(f"{name}: {why}" for name, why in list(unused.items())[:3])
        raise PointsError(f"no run gives a point for {metric}{': ' if first else ''}{first}")
    what = f"1 - {metric}" if turned(config) else metric
    counted = "training volumes" if config.samples is DataCount.volumes else "samples seen"
    return Points(used, unused, what, counted)


def metric_of(config: PointsConfig) -> str:
    """The metric's name: what is configured, else the table's `loss`, else the validation loss."""
    return config.metric or (LOSS if config.table is not None else "val/loss")


def turned(config: PointsConfig) -> bool:
    """Whether the metric grows with quality, as Dice does: then 1 - metric is the loss."""
    if config.one_minus is not None:
        return config.one_minus
    name = metric_of(config).lower()
    return "dice" in name and "loss" not in name


def _folders(runs: Sequence[str]) -> Iterator[Path]:
    """The run folders among, and directly below, what was given."""
    for run in runs:
        folder = Path(run)
        if not folder.is_dir():
            raise PointsError(f"{folder}: no such folder")
        inner = sorted(path.parent for path in folder.glob("*/config.yaml"))
        if not inner and not (folder / "config.yaml").exists():
            raise PointsError(f"{folder}: holds neither a run nor folders of runs (no config.yaml)")
        yield from [folder] if (folder / "config.yaml").exists() else inner


# ---- run folders ----


def _folder(folder: Path, config: PointsConfig) -> Point:
    record = read_grid_entry(folder)
    if record and record["state"] != "finished":
        raise PointsError(f"is {record['state']}, not finished")
    run = _configuration(folder / "config.yaml")
    step, value = _value(folder, config)
    volumes = _metric(folder, VOLUMES)[-1][1] if config.samples is DataCount.volumes else None
    name = record["name"] if record else folder.name
    return _point(name, run, step, volumes, _loss(value, config), record["places"] if record else None)


def _point(name: str, run: Any, step: int, volumes: float | None, loss: float, places: dict[str, str] | None) -> Point:
    """volumes: what D counts, where that is not the samples seen."""
    seen = step * run.data.global_batch
    return Point(
        name=name,
        params=float(parameters(run)),
        samples=float(seen if volumes is None else volumes),
        loss=loss,
        flops=float(seen * volume_flops(run)),
        places=places or {"seed": str(run.data.seed)},
    )


def _configuration(path: Path) -> Any:
    try:
        return loader.load_run([str(path)])
    except ConfigError as error:
        raise PointsError(str(error)) from None


def _value(folder: Path, config: PointsConfig) -> tuple[int, float]:
    """Step and value of the metric: the last, or the best; of a JSON file the number, at the run's last step."""
    name = metric_of(config)
    file, _, key = name.partition(":")
    if key and file.endswith(".json"):
        return _metric(folder, "val/loss")[-1][0], _number(folder / file, key)
    rows = _metric(folder, name)
    if config.take is MetricPick.best:
        return (max if turned(config) else min)(rows, key=lambda row: row[1])
    return rows[-1]


def _metric(folder: Path, name: str) -> list[tuple[int, float]]:
    path = folder / "metrics.csv"
    rows = read_metrics(path, name) if path.exists() else []
    if not rows:
        raise PointsError(f"metrics.csv holds no {name}")
    return rows


def _number(path: Path, key: str) -> float:
    """A number in a JSON file, by its dotted key; a part of the key may itself hold dots where it is there."""
    if not path.exists():
        raise PointsError(f"no file {path.name}")
    node = json.loads(path.read_text(encoding="utf-8"))
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) and part.isdecimal() else node.get(part)
        if node is None:
            raise PointsError(f"{path.name} holds no {key}")
    if not isinstance(node, (int, float)):
        raise PointsError(f"{path.name}: {key} is no number")
    return float(node)


def _loss(value: float, config: PointsConfig) -> float:
    loss = 1 - value if turned(config) else value
    if not (math.isfinite(loss) and loss > 0):
        raise PointsError(f"the loss is {loss:g}: its logarithm is needed")
    return loss


# ---- tables ----


def _table(path: Path, config: PointsConfig) -> Iterator[Point]:
    """Its rows. Raises PointsError naming file, line and column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise PointsError(f"{path}: no such file") from None
    loss = config.metric or LOSS
    for line, row in enumerate(rows, start=2):
        missing = [column for column in ("params", "samples", loss) if row.get(column) in (None, "")]
        if missing:
            raise PointsError(f"{path}:{line}: no {', '.join(missing)}; a table has columns params, samples, {loss}")
        try:
            yield _row(row, loss, f"{path.name}:{line}", config)
        except (ValueError, PointsError) as error:
            raise PointsError(f"{path}:{line}: {error}") from None


def _row(row: dict[str, str], loss: str, name: str, config: PointsConfig) -> Point:
    params, samples = float(row["params"]), float(row["samples"])
    if not (params > 0 and samples > 0):
        raise PointsError(f"params {params:g} and samples {samples:g} must be positive")
    flops = float(row["flops"]) if row.get("flops") else None
    others = {key: value for key, value in row.items() if key not in ("params", "samples", "flops", loss) and key}
    return Point(name, params, samples, _loss(float(row[loss]), config), flops, others)


# ---- wandb ----


def _at_wandb(place: str, config: PointsConfig, used: list[Point], unused: dict[str, str]) -> None:
    """The finished runs of ENTITY/PROJECT/GROUP. Raises PointsError where wandb is missing or cannot be reached."""
    try:
        import wandb  # not needed for anything on this machine's disk, and slow to import
    except ModuleNotFoundError:
        raise PointsError(f"{WANDB}{place}: needs wandb, which is not installed: pip install wandb") from None
    project, _, group = place.rpartition("/")
    try:
        runs = list(wandb.Api(timeout=30).runs(project, filters={"group": group}))
    except Exception as error:  # whatever its client, its network or its server raise
        raise PointsError(
            f"{WANDB}{place}: cannot be read ({' '.join(str(error).split())}): give the run folders"
        ) from None
    for run in runs:
        try:
            if run.state != "finished":
                raise PointsError(f"is {run.state}, not finished")
            used.append(_of_summary(run.name, dict(run.config), dict(run.summary), config))
        except PointsError as error:
            unused[f"{WANDB}{run.name}"] = str(error)


def _of_summary(name: str, logged: dict[str, Any], summary: dict[str, Any], config: PointsConfig) -> Point:
    """A point of what wandb holds of a run: its configuration, and the last value of each metric."""
    metric = metric_of(config)
    missing = [key for key in (metric, "trainer/global_step") if key not in summary]
    if missing or "config" not in logged:
        raise PointsError(f"its summary holds no {', '.join(missing) or 'configuration'}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(logged["config"]), encoding="utf-8")  # JSON is YAML
        run = _configuration(path)
    volumes = float(summary[VOLUMES]) if config.samples is DataCount.volumes else None
    step = int(summary["trainer/global_step"])
    return _point(name, run, step, volumes, _loss(float(summary[metric]), config), logged.get("places"))
