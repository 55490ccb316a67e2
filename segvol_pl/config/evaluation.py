"""The schemas of evaluation: cases, how to draw prompts, what to measure."""

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
    """How to get from a prompt to a mask of the full volume (paper Table 3)."""

    zoom = "zoom"
    resize = "resize"
    sliding = "sliding"


class Timing(StrEnum):
    """Whether the time of a prompt includes encoding that earlier prompts of the case have already done."""

    shared = "shared"
    cold = "cold"


class Slice(StrEnum):
    """Which axial slice a single-slice box is drawn on."""

    largest = "largest"
    middle = "middle"


class EvaluationProtocol(StrEnum):
    """A published way to evaluate, which sets prompts and calls itself."""

    none = ""
    cvpr25 = "cvpr25"
    cvpr25_text = "cvpr25-text"


BOX_SOURCES = ("exact", "jittered", "slice")
"""The built-in ways to draw a box from the ground truth."""


@dataclass
class CasesConfig(Keys):
    """Cases to evaluate: packed shards, CT files with their label maps, or the interactive challenge's files."""

    section = "data."

    shards: str | None = None
    """Folder of packed shards (with index.json)."""
    split: str = "test"
    """Split of the shards to evaluate, or `all` for every sample. CT files have no split: all are evaluated."""
    images: str | None = None
    """CT files instead of shards: a CT file, a DICOM folder, a folder of cases or a glob. Prepared as by `pack`."""
    labels: str | None = None
    """Label maps: a file, a folder or a glob. Paired with the images by case id."""
    cases: str | None = None
    """CSV or JSON file that lists images and labels, as for `pack`."""
    recipe: str | None = None
    """YAML file of a public data set, as for `pack`. It names the files below images=ROOT and the categories."""
    categories: str | None = None
    """YAML file that maps category names to label values. Required with label maps."""

    npz: str | None = None
    """Folder of the interactive challenge's CASE.npz instead of shards: imgs, gts, spacing, boxes, text_prompts."""
    truths: str | None = None
    """Folder of files of the same names that hold gts, if those of data.npz do not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.npz and (self.shards or self.files)),
            "data.npz",
            "excludes data.shards, data.images and data.cases: give one of them",
        )
        require(
            not (self.shards and self.files),
            "data.shards",
            "excludes data.images and data.cases: give one of them",
        )
        labelled = self.labels is None or self.categories is not None
        require(labelled, "data.categories", "label maps need data.categories=FILE (YAML: name -> label values)")

    @property
    def files(self) -> bool:
        """Whether to evaluate CT files instead of shards."""
        return self.images is not None or self.cases is not None


@dataclass
class DrawConfig(Keys):
    """How to draw boxes and points from the ground truth. Real users are less precise than `exact`."""

    section = "draw."

    boxes: list[str] = field(default_factory=lambda: ["exact"])
    """Boxes to try for every prompt with a box. exact: the structure's own box. jittered: each face moved. slice: the
    structure's extent on one axial slice, as a user draws it. package.module:function: your own."""
    jitter: float = ranged(0.1, least=0, below=0.5)
    """Maximum shift of each face of a jittered box, as a fraction of the box's extent."""
    slice: Slice = Slice.largest
    """Axial slice for a slice box. largest: where the structure is largest. middle: the middle one of its slices."""
    depth: float = ranged(0.0, least=0)
    """Depth of a slice box (mm), centred on its slice. 0: as deep as the structure."""
    points: list[str] = field(default_factory=lambda: ["random5"])
    """Points to try for every prompt with points. randomN: N points drawn inside. centre: the point deepest inside.
    package.module:function: your own."""
    outside: int = ranged(2, least=0)
    """Background points added to randomN."""
    components: bool = False
    """Prompt each connected component (26 neighbours) of a target separately and unite the masks. Text alone stays one
    prompt."""
    component_voxels: int = ranged(10, least=1)
    """Skip components smaller than this (voxels). If all are smaller, only the largest is prompted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.boxes) > 0, "draw.boxes", "needs at least one")
        require(len(self.points) > 0, "draw.points", "needs at least one")
        check_custom("draw.boxes", [name for name in self.boxes if name not in BOX_SOURCES], BOX_SOURCES)
        check_custom("draw.points", [name for name in self.points if not points_drawn(name)], ("centre", "randomN"))


def points_drawn(name: str) -> int:
    """How many points inside a structure an entry of `draw.points` stands for; 0 for an unknown entry."""
    number = name.removeprefix("random")
    return 1 if name == "centre" else int(number) if name.startswith("random") and number.isdecimal() else 0


@dataclass
class EvaluateConfig(Keys):
    """Evaluate a model on a set of cases and write a report. Resumes if interrupted."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt), exported model (.safetensors), or one on the hub: hub:OWNER/NAME, hub:OWNER/NAME@REVISION."""
    data: CasesConfig = field(default_factory=CasesConfig)
    out: str = MISSING
    """Folder for rows.csv, summary.json, report.html, and cases/ with the results so far."""
    protocol: EvaluationProtocol = EvaluationProtocol.none
    """Evaluate as the CVPR 2025 challenge on interactive 3-D segmentation, in place of modes, prompts and draw. cvpr25:
    a box, then five calls with one more click each, in the largest error of the call before. cvpr25-text: the
    category's name, with instances. Empty: by modes, prompts and draw."""
    target_dice: float = ranged(0.8, above=0, most=1)
    """With protocol=cvpr25: the Dice for which the report counts the clicks needed."""
    modes: list[Mode] = field(default_factory=lambda: [Mode.zoom])
    """zoom: zoom-out-zoom-in. resize: zooming out only. sliding: windows over the full volume (paper Table 3)."""
    prompts: list[str] = field(default_factory=lambda: ["text", "box+text", "points+text"])
    """Prompt combinations to evaluate. Boxes and points are drawn from the ground truth, as the report states."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    categories: list[str] = field(default_factory=list)
    """Categories to evaluate. Empty: all that a case contains. Categories named here are also prompted by text where
    they are absent, to count false positives."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for drawing prompts and for the bootstrap."""
    limit: int = ranged(0, least=0)
    """Maximum number of cases. 0: all."""
    tolerance: float = ranged(2.0, above=0)
    """Tolerance of the surface Dice (mm)."""
    timing: Timing = Timing.shared
    """What the seconds of a row include. shared: encoding is reused from earlier prompts of the case. cold: everything
    is encoded again, as for one prompt on a new volume (paper Table 3)."""
    metrics: list[str] = field(default_factory=list)
    """Custom metrics, each as package.module:function of (predicted mask, true mask, spacing in mm). Each adds a
    column, named after the function, to rows.csv, summary.json and the report."""
    instances: bool = False
    """Also score the parts of each category, connected by faces, as instances: F1 at an intersection over union of 0.5,
    mean Dice of the matched parts, and how many parts are missed and extra. Each is a column."""
    match_categories: bool = False
    """Also find out which category the mask of each spatial prompt matches best (paper Fig. 5)."""
    masks: bool = False
    """Write every mask as NIfTI to masks/."""
    pictures: int = ranged(6, least=0)
    """Categories to picture in the report, worst first, each with its worst, median and best case. 0: no pictures."""
    max_bad_fraction: float = ranged(0.0, least=0, most=1)
    """Fraction of cases that may be unreadable. They are listed in the report; above this fraction no report is
    written."""
    part: str = ""
    """K/N: evaluate only part K (from 0) of N parts of the cases, e.g. as one task of a SLURM array. A run without it
    combines the parts."""
    resume: bool = True
    """Continue from the results in `out`. false: start over."""
    rank_timeout: float = ranged(3600.0, above=0)
    """How long rank 0 waits for the next case of another rank (s) before aborting."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    sliding: SlidingConfig = field(default_factory=SlidingConfig)
    track: TrackConfig = field(default_factory=lambda: TrackConfig(wandb=Wandb.disabled))
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda, each rank of a node takes its own GPU."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, otherwise fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.data.shards is not None or self.data.files or self.data.npz is not None
        require(
            given, "data.shards", "give data.shards=DIR, data.images=... or data.cases=FILE for CT files, or data.npz"
        )
        require(len(self.modes) > 0, "modes", "needs at least one")
        check_combinations("prompts", self.prompts)
        check_custom("metrics", self.metrics)
        names = {name.rpartition(":")[2] for name in self.metrics}
        require(len(names) == len(self.metrics), "metrics", "gives two functions of one name")
        if self.part:
            parse_part(self.part)
