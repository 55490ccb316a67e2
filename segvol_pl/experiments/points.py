"""The points of a fit, from run folders, a table, or runs at wandb.

1. A run folder: N is computed from the configuration without what is frozen. D is the step of the value x global batch
   (or the number of training volumes): what the run saw until then, also if it was stopped, or continues another run.
   Training FLOPs are computed from the architecture, and the loss is any metric of `metrics.csv` or any number in a
   JSON file.
2. A CSV has the columns params, samples and loss.
3. A run at wandb has the same in its configuration and summary.

Runs that cannot be used are listed with the reason.
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

from segvol_pl.config import DataCount, MetricPick, PointsConfig, TrainConfig, loader
from segvol_pl.errors import ConfigError, PointsError
from segvol_pl.experiments.grid import parameters, volume_flops
from segvol_pl.run_folder import VOLUMES, read_grid_entry, read_metrics

WANDB = "wandb:"
LOSS = "loss"
"""Default name of the loss column in a table."""


@dataclass(frozen=True)
class Point:
    """The data of one run."""

    name: str
    params: float
    samples: float
    loss: float
    flops: float | None = None
    """Training FLOPs of the run."""
    places: dict[str, str] = field(default_factory=dict)
    """Axis of its grid -> label."""
    setup: dict[str, Any] = field(default_factory=dict)
    """What it was trained with, and `step`, at which the loss was measured; empty for a row of a table."""


@dataclass(frozen=True)
class Points:
    """Points, and the runs that could not be used, with reasons."""

    used: list[Point]
    unused: dict[str, str]
    loss: str
    """Description of the loss."""
    samples: str
    """Description of D."""
    params: str = "trainable parameters"
    """Description of N."""
    counted: str = "samples seen"
    """The same of D, in more words than `samples`."""
    measured: str = ""
    """Description of what the loss was measured on."""

    @property
    def early(self) -> list[str]:
        """Names of the runs whose loss was measured before their last step: their learning rate had not yet ended."""
        limits = [
            (point.name, point.setup["step"], point.setup["optim.max_steps"]) for point in self.used if point.setup
        ]
        return [name for name, step, last in limits if step < last]

    def logs(self, variables: Sequence[str]) -> np.ndarray:
        """Return the natural logs of the variables, (R,T)."""
        return np.log([[getattr(point, variable) for variable in variables] for point in self.used])

    @property
    def left_out(self) -> list[str]:
        """Runs that could not be used, one line each."""
        return [f"left out {name}: {why}" for name, why in self.unused.items()]

    @property
    def losses(self) -> np.ndarray:
        """Losses of the used points, (R,)."""
        return np.array([point.loss for point in self.used])


def gather(config: PointsConfig) -> Points:
    """Gather the points that a configuration names. Raises PointsError if there is none, ConfigError for bad keys."""
    used: list[Point] = []
    unused: dict[str, str] = {}
    if config.table is not None:
        used += _table(Path(config.table), config)
    for place in (run for run in config.runs if run.startswith(WANDB)):
        _at_wandb(place.removeprefix(WANDB), config, used, unused)
    for folder in run_folders([run for run in config.runs if not run.startswith(WANDB)]):
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
    texts = []
    if config.table:
        column = "the column {} of the table, which does not state what it counts"
        texts.append((column.format("params"), column.format("samples"), "as the table gives it"))
    if config.runs:
        trained = (
            "trainable parameters: frozen tensors and the text tower (CLIP), which is not part of the model, apart"
        )
        seen = f"{counted} until the loss was measured"
        texts.append((trained, seen, "of each run, on the volumes that it holds out"))
    return Points(used, unused, what, counted, *("; ".join(parts) for parts in zip(*texts, strict=True)))


def metric_of(config: PointsConfig) -> str:
    """Return the name of the metric: as configured, else `loss` for a table, else the validation loss."""
    return config.metric or (LOSS if config.table is not None else "val/loss")


def turned(config: PointsConfig) -> bool:
    """Return whether the loss is 1 - metric: the metric grows with quality, as Dice does."""
    if config.one_minus is not None:
        return config.one_minus
    name = metric_of(config).lower()
    return "dice" in name and "loss" not in name


def run_folders(runs: Sequence[str]) -> Iterator[Path]:
    """The given folders that are run folders, and run folders directly below the others. Raises PointsError."""
    for run in runs:
        folder = Path(run)
        if not folder.is_dir():
            raise PointsError(f"{folder}: no such folder")
        inner = sorted(path.parent for path in folder.glob("*/config.yaml"))
        if not inner and not (folder / "config.yaml").exists():
            raise PointsError(f"{folder}: is not a run folder and has none directly below it (no config.yaml)")
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
    """volumes: D, if it is not the number of samples seen."""
    seen = step * run.data.global_batch
    return Point(
        name=name,
        params=float(parameters(run)),
        samples=float(seen if volumes is None else volumes),
        loss=loss,
        flops=float(seen * volume_flops(run)),
        places=places or {"seed": str(run.data.seed)},
        setup=_setup(run, step),
    )


def _setup(run: Any, step: int) -> dict[str, Any]:
    """What the checklist of a law names: command, model, data, batch, optimizer, frozen parts, step of the loss."""
    optim = {key: _plain(value) for key, value in loader.flat(loader.plain(run.optim), "optim.").items()}
    frozen = ""
    if isinstance(run, TrainConfig):
        frozen = ", ".join([*run.freeze, *(["image_encoder.* but adapters"] if run.adapted else [])])
    command = "train" if isinstance(run, TrainConfig) else "pretrain"
    data = {f"data.{key}": _plain(getattr(run.data, key)) for key in ("shards", "mix", "fraction", "global_batch")}
    model = {f"model.{key}": _plain(getattr(run.model, key)) for key in ("hidden_size", "num_layers", "patch_size")}
    return {"command": command, "step": step, "freeze": frozen or "nothing", **model, **data, **optim}


def _plain(value: Any) -> Any:
    return " and ".join(map(str, value)) or "none" if isinstance(value, list) else value


def _configuration(path: Path) -> Any:
    try:
        return loader.load_run([str(path)])
    except ConfigError as error:
        raise PointsError(str(error)) from None


def _value(folder: Path, config: PointsConfig) -> tuple[int, float]:
    """Step and value of the metric, last or best. A number in a JSON file belongs to the last step."""
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
    """A number in a JSON file by its dotted key, where list items are numbered from 0."""
    if not path.exists():
        raise PointsError(f"no file {path.name}")
    node = json.loads(path.read_text(encoding="utf-8"))
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) and part.isdecimal() else node.get(part)
        if node is None:
            raise PointsError(f"{path.name} holds no {key}")
    if not isinstance(node, (int, float)):
        raise PointsError(f"{path.name}: {key} is not a number")
    return float(node)


def _loss(value: float, config: PointsConfig) -> float:
    loss = 1 - value if turned(config) else value
    if not (math.isfinite(loss) and loss > 0):
        raise PointsError(f"the loss is {loss:g}: it must be finite and above 0")
    return loss


# ---- tables ----


def _table(path: Path, config: PointsConfig) -> Iterator[Point]:
    """The rows of a table. Raises PointsError naming file, line and column."""
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
    """Add the finished runs of ENTITY/PROJECT/GROUP. Raises PointsError if wandb is missing or cannot be reached."""
    try:
        import wandb  # slow to import, and needed for this source only
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
    """A point from a run's configuration and the last value of each metric, as stored at wandb."""
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
