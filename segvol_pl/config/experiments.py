"""The demo, and scaling laws over many runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import HIGHEST_SEED, MISSING, Keys, ranged, require


class DataCount(StrEnum):
    """What D of a scaling law counts."""

    seen = "seen"
    volumes = "volumes"


class MetricPick(StrEnum):
    """Which value of a metric is a run's."""

    last = "last"
    best = "best"


@dataclass
class DemoConfig(Keys):
    """The main job on phantoms: pack, pre-train, train, evaluate, report."""

    out: str = "runs/demo"
    """Folder of everything that the demo writes."""
    volumes: int = ranged(48, least=1)
    """Phantoms to make."""
    pretrain_steps: int = ranged(200, least=1)
    """SimMIM steps."""
    train_steps: int = ranged(1500, least=1)
    """Supervised steps."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seeds phantoms and training."""
    device: str = "auto"
    """cpu, cuda or auto: the GPU where there is one. It computes in float32 on either."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.device in ("auto", "cpu", "cuda"), "device", f"{self.device!r} is none of auto, cpu, cuda")


@dataclass
class PointsConfig(Keys):
    """Runs as points: size, data, loss."""

    runs: list[str] = field(default_factory=list)
    """Run folders, folders of run folders, or wandb:ENTITY/PROJECT/GROUP: RUNS on the command line."""
    table: str | None = None
    """CSV with the columns params, samples, loss, and flops if known."""
    metric: str | None = None
    """What the loss is: a metric of metrics.csv, FILE.json:KEY of a run folder, a column of the table. None: val/loss,
    of a table loss."""
    one_minus: bool | None = None
    """Whether 1 - metric is the loss. None: where the metric's name says dice and not loss."""
    take: MetricPick = MetricPick.last
    """The metric's last value, or its best."""
    samples: DataCount = DataCount.seen
    """What D counts: samples seen, or the volumes trained on."""
    out: str = "scaling"
    """Folder of the results."""
    bootstraps: int = ranged(400, least=100)
    """Bootstrap samples behind each interval; one of 95 % needs at least 100."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seeds the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.runs) or self.table is not None, "runs", "give run folders, or table=CSV")


@dataclass
class FitConfig(PointsConfig):
    """Fit scaling laws to runs: intervals, held-out extrapolation, frontier, verdict; JSON, CSV, figures, a page."""

    held_out: float = ranged(0.1, above=0, below=0.5)
    """Share of the settings, the largest, that are predicted from the others."""
    flops_per: float = ranged(6.0, above=0)
    """Training FLOPs per parameter and sample, where neither run nor table states them (6 where samples are tokens)."""


@dataclass
class CompareConfig(PointsConfig):
    """Compare the points of one axis of a grid by pairs of runs that are equal in all else, seed included."""

    axis: str = MISSING
    """The axis, as the grid names it."""
    baseline: str | None = None
    """The point that others are compared with; none: the first run's."""
