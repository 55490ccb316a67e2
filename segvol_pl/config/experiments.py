"""The schemas of the demo, of scaling laws, and of the paper's claims."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import HIGHEST_SEED, MISSING, Keys, ranged, require


class DataCount(StrEnum):
    """What D of a scaling law counts."""

    seen = "seen"
    volumes = "volumes"


class MetricPick(StrEnum):
    """Which value of a run's metric to use."""

    last = "last"
    best = "best"


@dataclass
class DemoConfig(Keys):
    """Run the full job on synthetic CTs: pack, pre-train, train, evaluate, report."""

    out: str = "runs/demo"
    """Folder for everything that the demo writes."""
    volumes: int = ranged(48, least=1)
    """Synthetic CTs to make."""
    scale: float | None = ranged(None, above=0)
    """Multiplies their voxels along each axis. null: that of configs/tiny/phantoms.yaml."""
    pretrain_steps: int = ranged(500, least=1)
    """Pre-training steps (SimMIM)."""
    train_steps: int = ranged(2000, least=1)
    """Training steps (supervised)."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the synthetic CTs and for training."""
    device: str = "auto"
    """cpu, cuda or auto: the GPU if there is one. Computes in float32 on both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.device in ("auto", "cpu", "cuda"), "device", f"{self.device!r} is none of auto, cpu, cuda")


@dataclass
class PointsConfig(Keys):
    """Runs as points of a scaling law: size, data, loss."""

    runs: list[str] = field(default_factory=list)
    """Run folders, folders of run folders, or wandb:ENTITY/PROJECT/GROUP. RUNS on the command line."""
    table: str | None = None
    """CSV file with the columns params, samples and loss, and flops if known."""
    metric: str | None = None
    """Metric to use as loss: a metric in metrics.csv, FILE.json:KEY in a run folder, or a column of the table. null:
    val/loss for runs, loss for a table."""
    one_minus: bool | None = None
    """Use 1 - metric as the loss. null: yes if the metric's name contains dice but not loss."""
    take: MetricPick = MetricPick.last
    """last: the metric's last value. best: its best value."""
    samples: DataCount = DataCount.seen
    """What D counts. seen: samples seen. volumes: distinct volumes trained on."""
    out: str = "scaling"
    """Folder for the results."""
    bootstraps: int = ranged(400, least=100)
    """Bootstrap samples per interval. A 95 % interval needs at least 100."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.runs) or self.table is not None, "runs", "give run folders, or table=CSV")


@dataclass
class FitConfig(PointsConfig):
    """Fit scaling laws to runs: intervals, held-out extrapolation, frontier and verdict, as JSON, CSV, figures and a
    page."""

    held_out: float = ranged(0.1, above=0, below=0.5)
    """Fraction of the settings (the largest ones) to hold out and predict from the others."""
    flops_per: float = ranged(6.0, above=0)
    """Training FLOPs per parameter and sample, used if neither run nor table states FLOPs. The default is correct if
    samples are tokens."""


@dataclass
class CompareConfig(PointsConfig):
    """Compare the points of one grid axis by pairs of runs that are equal in everything else, including the seed."""

    axis: str = MISSING
    """Axis to compare, as named in the grid."""
    baseline: str | None = None
    """Point to compare the others with. null: the point of the first run."""


@dataclass
class MixConfig(Keys):
    """Fit laws of data mixtures to runs: what a larger share of a source does to the loss on each source, and which
    mixture that proposes."""

    runs: list[str] = field(default_factory=list)
    """Run folders, or folders of run folders, of runs that differ in data.mix and seeds alone. RUNS on the command
    line."""
    table: str | None = None
    """CSV file with the columns share/SOURCE and loss/SOURCE."""
    metric: str = "val/loss"
    """Beginning of the metrics of the sources: val/loss or val/dice. Of Dice, 1 - Dice is used."""
    take: MetricPick = MetricPick.last
    """last: each metric's last value. best: its best value."""
    goal: list[str] = field(default_factory=list)
    """Sources whose losses the proposed mixture minimises, all alike. Empty: all sources."""
    predict: list[str] = field(default_factory=list)
    """A mixture whose losses to predict, as SOURCE=SHARE of each source. Refused outside of the mixtures that were
    run."""
    out: str = "mix"
    """Folder for mix.json, transfer.csv, mixtures.csv, figures and index.html."""
    bootstraps: int = ranged(400, least=100)
    """Bootstrap samples per interval. A 95 % interval needs at least 100."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.runs) != (self.table is not None), "runs", "give run folders, or table=CSV")
        require(self.metric in ("val/loss", "val/dice"), "metric", f"{self.metric!r} is none of val/loss, val/dice")


@dataclass
class PaperConfig(Keys):
    """Try the claims of the SegVol paper as experiments, and write a page with the paper's figures and ours."""

    claims: list[str] = field(default_factory=list)
    """Claims, as names of files in configs/paper or as paths. Empty: all. CLAIMS on the command line."""
    size: str = "tiny"
    """tiny: phantoms and a small model, for a CPU. full: the paper's data sets and steps. FILE.yaml: your own."""
    out: str | None = None
    """Folder for everything that is written. null: runs/paper-SIZE."""
    shards: str | None = None
    """Folder that holds a folder of shards per data set. null: data sets are phantoms, which are made in OUT/shards."""
    seeds: list[int] = ranged([], least=0, most=HIGHEST_SEED)
    """Seeds. Empty: those of the size."""
    run: str | None = None
    """Number of the job to run, all: every job that is not finished, then the page. page: only the page. null: list the
    jobs."""
    processes: int = ranged(1, least=1)
    """Jobs to run at a time with run=all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.run in (None, "all", "page") or str(self.run).isdecimal()
        require(words, "run", f"{self.run!r} is none of all, page, or the number of a job")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", "names a seed twice")
