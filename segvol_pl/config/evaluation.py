"""Evaluation: its cases, the prompts that are drawn from their label maps, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.data import check_combinations
from segvol_pl.config.fields import HIGHEST_SEED, MISSING, Keys, check_custom, ranged, require
from segvol_pl.config.inference import SlidingConfig, ZoomConfig
from segvol_pl.config.model import Precision
from segvol_pl.config.packing import parse_part
from segvol_pl.config.training import TrackConfig, Wandb


class Mode(StrEnum):
    """How a prompt becomes a mask of the whole volume (paper Table 3)."""

    zoom = "zoom"
    resize = "resize"
    sliding = "sliding"


class Timing(StrEnum):
    """Whether a row's seconds hold what earlier prompts of the case have encoded."""

    shared = "shared"
    cold = "cold"


class Slice(StrEnum):
    """The axial slice that a box of one slice is drawn on."""

    largest = "largest"
    middle = "middle"


BOX_SOURCES = ("exact", "jittered", "slice")
"""How well an evaluation draws a box from the truth."""


@dataclass
class CasesConfig(Keys):
    """The cases that an evaluation reads: packed ones, or CT files with their label maps."""

    section = "data."

    shards: str | None = None
    """Folder of packed shards (holds index.json)."""
    split: str = "test"
    """Split of the shards to evaluate; `all` for every sample. Files have none: all of them are evaluated."""
    images: str | None = None
    """Instead of shards: a CT file, a DICOM folder, a folder of cases or a glob; prepared as `pack` does."""
    labels: str | None = None
    """Label maps, given likewise; paired by case id."""
    cases: str | None = None
    """CSV or JSON that states the pairs, as for `pack`."""
    recipe: str | None = None
    """YAML of a public data set, as for `pack`: names its files below images=ROOT and its categories."""
    categories: str | None = None
    """YAML: category name -> label values of the label maps. Needed where there are label maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.shards and self.files), "data.shards", "and data.images or data.cases: give one of them")
        labelled = self.labels is None or self.categories is not None
        require(labelled, "data.categories", "labels need data.categories=FILE (YAML: name -> label values)")

    @property
    def files(self) -> bool:
        """Whether CT files are evaluated, not shards."""
        return self.images is not None or self.cases is not None


@dataclass
class DrawConfig(Keys):
    """How spatial prompts are drawn from the truth. Users draw none as well as `exact`."""

    section = "draw."

    boxes: list[str] = field(default_factory=lambda: ["exact"])
    """Boxes that every prompt with a box is tried with. exact: the structure's own; jittered: each face moved; slice:
    its extent on one axial slice alone, as a user draws it; package.module:function: your own drawing."""
    jitter: float = ranged(0.1, least=0, below=0.5)
    """A face of a jittered box moves by up to this share of the box's extent."""
    slice: Slice = Slice.largest
    """The axial slice of a slice's box: where the structure is largest, or the middle one of those that it spans."""
    depth: float = ranged(0.0, least=0)
    """mm that a slice's box spans, its slice in the middle; 0: as deep as the structure."""
    points: list[str] = field(default_factory=lambda: ["random5"])
    """Points that every prompt with points is tried with. randomN: N drawn inside; centre: the one deepest inside;
    package.module:function: your own drawing."""
    outside: int = ranged(2, least=0)
    """Points outside that randomN gets beside."""
    components: bool = False
    """One prompt for each connected component (26 neighbours) of a scattered target, their masks united; text alone
    stays one prompt."""
    component_voxels: int = ranged(10, least=1)
    """Components of fewer voxels get no prompt, unless all are so small: then the largest gets one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.boxes) > 0, "draw.boxes", "needs at least one")
        require(len(self.points) > 0, "draw.points", "needs at least one")
        check_custom("draw.boxes", [name for name in self.boxes if name not in BOX_SOURCES], BOX_SOURCES)
        check_custom("draw.points", [name for name in self.points if not points_drawn(name)], ("centre", "randomN"))


def points_drawn(name: str) -> int:
    """Points inside that one of `draw.points` means; 0 where it means nothing."""
    number = name.removeprefix("random")
    return 1 if name == "centre" else int(number) if name.startswith("random") and number.isdecimal() else 0


@dataclass
class EvaluateConfig(Keys):
    """Figures of a model over a set of cases: rows, tables, report. A run that was stopped goes on where it was."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt) or exported model (.safetensors)."""
    data: CasesConfig = field(default_factory=CasesConfig)
    out: str = MISSING
    """Folder of rows.csv, summary.json and report.html, and of cases/, the results so far."""
    modes: list[Mode] = field(default_factory=lambda: [Mode.zoom])
    """zoom: zoom-out-zoom-in; resize: the zoom-out alone; sliding: windows over the whole volume (paper Table 3)."""
    prompts: list[str] = field(default_factory=lambda: ["text", "box+text", "points+text"])
    """Prompt combinations to evaluate; spatial prompts are drawn from the truth, and the report says so."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    categories: list[str] = field(default_factory=list)
    """Categories to evaluate; none: all that a case holds. Those named are asked for by text where they are absent
    too, to count what is found all the same."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seeds the drawn prompts and the bootstrap."""
    limit: int = ranged(0, least=0)
    """Cases at most; 0 for all."""
    tolerance: float = ranged(2.0, above=0)
    """mm by which surfaces may be apart for the surface Dice."""
    timing: Timing = Timing.shared
    """What a row's seconds hold. shared: what the case's earlier prompts encoded comes free; cold: everything is
    encoded anew, as for a single prompt on a new volume (paper Table 3)."""
    metrics: list[str] = field(default_factory=list)
    """Further figures, each a package.module:function of your own of (predicted mask, truth, spacing in mm); a column
    of the function's name in rows.csv, summary.json and the report."""
    match_categories: bool = False
    """Also read each spatial prompt's mask: which of all categories it looks like (paper Fig. 5)."""
    masks: bool = False
    """Write every mask as NIfTI into masks/."""
    pictures: int = ranged(6, least=0)
    """Categories pictured in the report, the worst first: each with its worst, median and best case."""
    max_bad_fraction: float = ranged(0.0, least=0, most=1)
    """Share of cases that may turn out unreadable; they are listed. Beyond it there is no report."""
    part: str = ""
    """K/N: evaluate the K-th (from 0) of N parts of the cases alone, e.g. as a task of a SLURM array; a run without it
    puts the parts together."""
    resume: bool = True
    """Go on with the results in `out`; false: begin anew."""
    rank_timeout: float = ranged(3600.0, above=0)
    """Seconds for which rank 0 waits for the next case of another rank before it gives up."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    sliding: SlidingConfig = field(default_factory=SlidingConfig)
    track: TrackConfig = field(default_factory=lambda: TrackConfig(wandb=Wandb.disabled))
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda each rank of a node takes a GPU of its own."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, else fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.data.shards is not None or self.data.files
        require(given, "data.shards", "give data.shards=DIR, or data.images=... or data.cases=FILE for CT files")
        require(len(self.modes) > 0, "modes", "needs at least one")
        check_combinations("prompts", self.prompts)
        check_custom("metrics", self.metrics)
        names = {name.rpartition(":")[2] for name in self.metrics}
        require(len(names) == len(self.metrics), "metrics", "gives two functions of one name")
        if self.part:
            parse_part(self.part)
