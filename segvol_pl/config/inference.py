"""From a CT and a prompt to a mask: zooming, sliding windows, `predict` and `view`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import HIGHEST_SEED, MISSING, Keys, ranged, require
from segvol_pl.config.model import Convention, Precision


class Coordinates(StrEnum):
    """What numbers of a prompt's box and points are: voxels in canonical axes, or millimetres of RAS or LPS."""

    voxel = "voxel"
    ras = "ras"
    lps = "lps"


class Overlaps(StrEnum):
    """Whose voxels they are that several categories claim."""

    probability = "probability"
    order = "order"


class Blend(StrEnum):
    """How sliding windows count where they overlap."""

    constant = "constant"
    gaussian = "gaussian"


EVERY_CATEGORY = "all"
"""As the only text of a prediction: every category that the model knows."""


@dataclass
class ZoomConfig(Keys):
    """Zoom-out-zoom-in (paper Sec. 2.3)."""

    section = "zoom."

    threshold: float = ranged(0.5, above=0, below=1)
    """Probability above which a voxel belongs to the mask."""
    overlap: float = ranged(0.5, least=0, below=1)
    """Overlap of neighbouring zoom-in windows."""
    batch: int = ranged(0, least=0)
    """Zoom-in windows encoded together. 0: 8 on a GPU, 2 on a CPU."""
    decode_batch: int = ranged(0, least=0)
    """Prompts decoded together, of whichever windows; one takes about 0.3 GB at the published size. 0: 16 on a GPU, 4
    on a CPU. In fp32 the number moves logits by less than 1e-5, in bf16 by some hundredths, and with them the voxels at
    a mask's edge."""
    cache_gb: float = ranged(1.0, least=0)
    """Room for the tokens of encoded windows, in GB, so that further prompts only decode; at the published size a
    window takes 6 MB, in bf16 3. What was used longest ago goes first. 0: none are kept."""
    device_gb: float = ranged(0.5, least=0)
    """How much of that may lie on the GPU; the rest waits in main memory."""
    points: int = ranged(5, least=0)
    """Points that a points prompt gets in each zoom-in window."""
    interpolation: Convention = Convention.consistent
    """How the volume is shrunk and the coarse logits are brought back: averaging and linear. `published`: both by
    nearest neighbour, because the released weights were validated on images shrunk so."""
    grid: Convention = Convention.consistent
    """Where zoom-in windows lie: on one grid over the volume, whole wherever it is large enough, so that prompts share
    them. `published`: on a grid of each region of interest, which is cut off at the volume's border and padded with
    zeros around up to one window."""
    reach: float = ranged(1.0, least=0)
    """How far beyond the coarse mask's box zooming in may change anything, in voxels of the overview; the user's box
    and points inside the structure are within reach anyway. What windows find farther off, where zooming out saw
    nothing, is more often another organ; parts that the overview is too coarse for are farther off too. With
    `grid: published` the region is the published one."""
    reflection: Convention = Convention.consistent
    """What a window is told: the user's own prompt inside it, and windows that hold nothing are skipped. `published`:
    the coarse mask's box in place of the user's, points drawn from the enlarged user's points, no window skipped."""

    def batches(self, kind: str) -> tuple[int, int]:
        """Windows encoded and prompts decoded together on a device of that kind, `cuda` or `cpu`."""
        encoded, decoded = (8, 16) if kind == "cuda" else (2, 4)
        return self.batch or encoded, self.decode_batch or decoded


@dataclass
class SlidingConfig(Keys):
    """Windows over the whole volume at native resolution."""

    section = "sliding."

    overlap: float = ranged(0.5, least=0, below=1)
    """Overlap of neighbouring windows."""
    blend: Blend = Blend.constant
    """How windows are weighted where they overlap: alike, or their middles more (as MONAI does)."""
    batch: int = ranged(2, least=1)
    """Windows encoded together."""


@dataclass
class PredictConfig(Keys):
    """One CT in, one mask or label map on its own grid out."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt) or exported model (.safetensors)."""
    image: str = MISSING
    """CT: NIfTI, NRRD, MHA or a DICOM folder."""
    out: str = MISSING
    """Mask to write (.nii.gz, .nii, .nrrd, .mha; .dcm for a DICOM SEG of a DICOM folder). Of several categories it is a
    label map, 1 for the first, and scores are written beside it as .json."""
    text: list[str] = field(default_factory=list)
    """Category name, several as [liver, spleen], or `all` that the model knows."""
    box: list[float] | None = ranged(None)
    """d0 h0 w0 d1 h1 w1: voxels of the CT in canonical axes (superior, anterior, right), inclusive maximum. In
    millimetres x0 y0 z0 x1 y1 z1, see coordinates."""
    points: list[list[float]] | None = ranged(None)
    """Rows of d h w label: voxels as for box, or x y z label in millimetres; label 1 inside, 0 outside."""
    coordinates: Coordinates = Coordinates.voxel
    """Of box and points: voxel, or millimetres in the file's world, x y z growing to right, anterior, superior (ras, as
    in NIfTI) or to left, posterior, superior (lps, as in DICOM and ITK)."""
    previous: str | None = None
    """Mask of the same CT to refine: zooming out is left out, its box and points drawn from it prompt the windows."""
    overlaps: Overlaps = Overlaps.probability
    """A voxel that several categories claim: goes to the most probable, or, by order, to the last named of them (name a
    tumour after its organ)."""
    clip_model: str | None = None
    """Local folder or hub name of the CLIP that made the model's text bank: for names that the bank lacks."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seeds the points re-drawn in zoom-in windows."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda each task of a node takes a GPU of its own."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, else fp32."""

    @property
    def everything(self) -> bool:
        """Whether all categories of the model are asked for."""
        return self.text == [EVERY_CATEGORY]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text, str):  # from Python
            self.text = [self.text]
        spatial = [name for name in ("box", "points", "previous") if getattr(self, name) is not None]
        require(bool(self.text or self.box or self.points), "text", "give at least one of text, box, points")
        require(len(set(self.text)) == len(self.text), "text", "names a category twice")
        if len(self.text) > 1 or self.everything:
            require(not spatial, "text", f"several categories are asked by text alone, leave {', '.join(spatial)} out")
        if self.box is not None:
            require(len(self.box) == 6, "box", f"needs 6 numbers d0 h0 w0 d1 h1 w1, got {len(self.box)}")
        for row in self.points or []:
            require(len(row) == 4, "points", f"each row needs d h w label, got {row}")


@dataclass
class ViewConfig(Keys):
    """Open a CT on a local page: scroll, click, draw, type, see the mask."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt) or exported model (.safetensors)."""
    image: str = MISSING
    """CT: NIfTI, NRRD, MHA or a DICOM folder; CT on the command line."""
    host: str = "127.0.0.1"
    """Address to listen at. Any other than the loopback's shows the CT to whoever can reach it."""
    port: int = ranged(5006, least=0, below=2**16)
    """Port to listen at; 0 for any that is free."""
    show: bool = True
    """Open the page in this machine's browser."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seeds the points re-drawn in zoom-in windows."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda each task of a node takes a GPU of its own."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, else fp32."""
