"""The schemas of inference: zoom-out-zoom-in, sliding windows, `predict`, `view`, `serve` and `challenge predict`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import HIGHEST_SEED, MISSING, Keys, ranged, require
from segvol_pl.config.model import LINE, Convention, Precision
from segvol_pl.config.packing import parse_part


class Coordinates(StrEnum):
    """Unit and axes of a prompt's box and points: voxels in canonical axes, or mm in RAS or LPS."""

    voxel = "voxel"
    ras = "ras"
    lps = "lps"


class Overlaps(StrEnum):
    """How to assign voxels claimed by several categories."""

    probability = "probability"
    order = "order"


class Blend(StrEnum):
    """How to weight sliding windows where they overlap."""

    constant = "constant"
    gaussian = "gaussian"


WRITABLE, DICOM_SEG, DICOM_RTSTRUCT = (".nii", ".nii.gz", ".nrrd", ".mha"), ".dcm", ".rtstruct.dcm"
"""Endings of masks: of files of voxels, of a DICOM SEG, and of a DICOM RTSTRUCT."""
MASK_ENDINGS = (*WRITABLE, DICOM_SEG, DICOM_RTSTRUCT)


def mask_ending(name: str) -> str:
    """The ending of a mask's file name, in small letters: the longest of MASK_ENDINGS that fits; empty if none does."""
    return max((ending for ending in MASK_ENDINGS if name.lower().endswith(ending)), key=len, default="")


OPPOSITES = ("RL", "AP", "SI")
"""The anatomical directions, in pairs: right and left, anterior and posterior, superior and inferior."""


def names_axes(axes: str) -> bool:
    """Whether a text names one direction of each pair, such as SPL or RAS."""
    return len(axes) == len(OPPOSITES) and all(sum(letter in axes for letter in pair) == 1 for pair in OPPOSITES)


EVERY_CATEGORY = "all"
"""The text that stands for every category that the model knows."""


@dataclass
class ZoomConfig(Keys):
    """Zoom-out-zoom-in inference (paper Sec. 2.3)."""

    section = "zoom."

    threshold: float = ranged(0.5, above=0, below=1)
    """Probability above which a voxel belongs to the mask."""
    overlap: float = ranged(0.5, least=0, below=1)
    """Overlap of neighbouring zoom-in windows, as a fraction of the window."""
    batch: int = ranged(0, least=0)
    """Zoom-in windows to encode together. 0: 8 on a GPU, 2 on a CPU."""
    decode_batch: int = ranged(0, least=0)
    """Prompts to decode together, across windows. Each takes about 0.3 GB at the published size. 0: 16 on a GPU, 4 on a
    CPU. The number changes logits by less than 1e-5 in fp32 and by some hundredths in bf16, which can move voxels at
    the edge of a mask."""
    cache_gb: float = ranged(1.0, least=0)
    """Cache for the tokens of encoded windows (GB), so that further prompts only need decoding. A window takes 6 MB at
    the published size, 3 MB in bf16. The least recently used windows are dropped first. 0 disables."""
    device_gb: float = ranged(0.5, least=0)
    """Part of this cache that may be on the GPU (GB). The rest is kept in main memory."""
    points: int = ranged(5, least=0)
    """Points that a points prompt gets in each zoom-in window."""
    interpolation: Convention = Convention.consistent
    """How to downsample the volume and upsample the coarse logits. consistent: averaging and linear. published: nearest
    neighbour for both, as the released weights were validated."""
    grid: Convention = Convention.consistent
    """Where to put zoom-in windows. consistent: on one grid over the volume, which all prompts share; windows are never
    cut off unless the volume is smaller than a window. published: on a grid over each region of interest, which is cut
    off at the volume's border and zero-padded to at least one window."""
    reach: float = ranged(1.0, least=0)
    """How far beyond the box of the coarse mask zooming in may change the mask (voxels of the overview). The user's box
    and the points inside the structure are always within reach. Farther away, where zooming out found nothing, windows
    mostly find other organs, but also parts too small for the overview. Ignored with `grid: published`, which uses the
    published region."""
    mix: float = ranged(0.0, least=0)
    """Weight of the coarse logits in the region of interest; that of the windows' mean is 1. 0: the windows alone, as
    published."""
    reflection: Convention = Convention.consistent
    """Which prompts a window gets. consistent: the user's own prompt where it lies in the window, points drawn from the
    coarse mask if there are any, and the coarse mask if model.mask_prompt; windows without any prompt are skipped.
    published: the box of the coarse mask instead of the user's box, and points drawn from the user's enlarged points;
    no window is skipped."""

    def batches(self, kind: str) -> tuple[int, int]:
        """How many windows to encode and prompts to decode together on a device of type `cuda` or `cpu`."""
        encoded, decoded = (8, 16) if kind == "cuda" else (2, 4)
        return self.batch or encoded, self.decode_batch or decoded


@dataclass
class SlidingConfig(Keys):
    """Sliding windows over the full volume at native resolution."""

    section = "sliding."

    overlap: float = ranged(0.5, least=0, below=1)
    """Overlap of neighbouring windows, as a fraction of the window."""
    blend: Blend = Blend.constant
    """How to weight windows where they overlap. constant: equally. gaussian: the centre of a window counts more (as in
    MONAI)."""
    batch: int = ranged(2, least=1)
    """Windows to encode together."""


@dataclass
class PredictConfig(Keys):
    """Segment one CT, or many, and write the mask or label map on each CT's own grid."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt), exported model (.safetensors), or one on the hub: hub:OWNER/NAME, hub:OWNER/NAME@REVISION."""
    image: str | None = None
    """CT to segment: NIfTI, NRRD, MHA or a DICOM folder."""
    out: str = MISSING
    """Mask to write: .nii.gz, .nii, .nrrd or .mha. For a CT from a DICOM folder also .dcm, a DICOM SEG, or
    .rtstruct.dcm, a DICOM RTSTRUCT (contours). Several categories give a label map (1 is the first category) and a
    .json file with their scores next to it. With images, a folder."""
    images: str | None = None
    """CTs to segment by text, in place of image: a folder, a glob, or a list (.csv with the columns id and image, or
    .json). Each gets a label map OUT/ID.nii.gz; volumes and densities of all are in OUT/statistics.csv. The same
    command continues where it stopped. A CT that cannot be used is listed in OUT/failed.csv, and the others follow."""
    ending: str = ".nii.gz"
    """Ending of the files of images: .nii.gz, .nii, .nrrd, .mha, .dcm or .rtstruct.dcm."""
    part: str = ""
    """K/N: this process segments only part K of N of images (K from 0). For a SLURM array."""
    text: list[str] = field(default_factory=list)
    """Category name, several as [liver, spleen], or `all` for every category that the model knows."""
    box: list[float] | None = ranged(None)
    """Box as d0 h0 w0 d1 h1 w1: voxels of the CT in canonical axes (towards superior, anterior, right), maximum
    included. In mm as x0 y0 z0 x1 y1 z1, see coordinates."""
    points: list[list[float]] | None = ranged(None)
    """Points, each as d h w label in voxels as for box, or x y z label in mm. Label 1 is inside the structure, 0
    outside."""
    line: list[float] | None = ranged(None)
    """Line across the structure, from end to end in one axial slice, as d h w d h w in voxels as for box, or x y z x y
    z in mm. Needs a model with model.landmarks=[line]."""
    landmarks: list[str] = field(default_factory=list)
    """Landmarks of a kind that the model knows, each as NAME:d,h,w,d,h,w,... in voxels as for box, or x y z in mm."""
    coordinates: Coordinates = Coordinates.voxel
    """Unit of box, points, line and landmarks. voxel: voxels. ras: mm, with x y z towards right, anterior, superior (as
    in NIfTI). lps: mm, with x y z towards left, posterior, superior (as in DICOM and ITK)."""
    previous: str | None = None
    """Mask of the same CT to refine. Skips zooming out: box and points drawn from this mask prompt the windows."""
    overlaps: Overlaps = Overlaps.probability
    """How to assign voxels claimed by several categories. probability: to the most probable. order: to the last one
    named (name a tumour after its organ)."""
    clip_model: str | None = None
    """Local folder or hub name of the CLIP model that made the model's text bank. Needed for names that are not in the
    bank."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the points drawn again in zoom-in windows."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda, each task of a node takes its own GPU."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, otherwise fp32."""

    @property
    def everything(self) -> bool:
        """Whether to segment every category of the model."""
        return self.text == [EVERY_CATEGORY]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text, str):  # from Python
            self.text = [self.text]
        parts = ("box", "points", "line", "landmarks")
        spatial = [name for name in (*parts, "previous") if getattr(self, name) not in (None, [])]
        given = self.text or set(spatial) - {"previous"}
        require(bool(given), "text", f"give at least one of text, {', '.join(parts)}")
        require(len(set(self.text)) == len(self.text), "text", "names a category twice")
        if len(self.text) > 1 or self.everything:
            require(not spatial, "text", f"several categories need text alone: leave {', '.join(spatial)} out")
        if self.images is None:
            require(self.image is not None, "image", "give a CT, or images=DIR for many")
            require(not self.part, "part", "needs images")
        else:
            require(self.image is None, "image", "leave it out, or images")
            require(not spatial, "images", f"many CTs are segmented by text alone: leave {', '.join(spatial)} out")
            fits = f"{self.ending!r} must be one of {', '.join(MASK_ENDINGS)}"
            require(self.ending in MASK_ENDINGS, "ending", fits)
            if self.part:
                parse_part(self.part)
        if self.box is not None:
            require(len(self.box) == 6, "box", f"needs 6 numbers d0 h0 w0 d1 h1 w1, got {len(self.box)}")
        for row in self.points or []:
            require(len(row) == 4, "points", f"each row needs d h w label, got {row}")
        if self.line is not None:
            require(len(self.line) == 6, "line", f"needs 6 numbers d h w d h w, got {len(self.line)}")
        names = [_named_numbers(entry)[0] for entry in self.landmarks] + ([] if self.line is None else [LINE])
        require(len(set(names)) == len(names), "landmarks", "names a kind twice")

    @property
    def landmark_rows(self) -> dict[str, list[list[float]]]:
        """Kind -> rows of d h w, or of x y z in mm, from `line` and `landmarks`."""
        given = dict(_named_numbers(entry) for entry in self.landmarks)
        given |= {} if self.line is None else {LINE: self.line}
        return {name: [numbers[at : at + 3] for at in range(0, len(numbers), 3)] for name, numbers in given.items()}


def _named_numbers(entry: str) -> tuple[str, list[float]]:
    """Read `NAME:d,h,w,...`, whose name may hold a colon. Raises ConfigError."""
    name, _, text = entry.rpartition(":")
    try:
        numbers = [float(number) for number in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        numbers = []
    complete = bool(name) and len(numbers) > 0 and len(numbers) % 3 == 0 and all(map(math.isfinite, numbers))
    require(complete, "landmarks", f"{entry!r} is no NAME:d,h,w,d,h,w,...")
    return name, numbers


@dataclass
class ViewConfig(Keys):
    """Open a CT in a local web page: scroll, click, draw or type to get a mask."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt), exported model (.safetensors), or one on the hub: hub:OWNER/NAME, hub:OWNER/NAME@REVISION."""
    image: str = MISSING
    """CT to open: NIfTI, NRRD, MHA or a DICOM folder. CT on the command line."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address other than loopback shows the CT to everyone who can reach it."""
    port: int = ranged(5006, least=0, below=2**16)
    """Port to listen on. 0: any free port."""
    show: bool = True
    """Open the page in a browser on this machine."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the points drawn again in zoom-in windows."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda, each task of a node takes its own GPU."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, otherwise fp32."""


@dataclass
class ChallengePredictConfig(Keys):
    """Segment the cases of a folder in the format of the CVPR 2025 challenge on interactive segmentation."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt), exported model (.safetensors), or one on the hub: hub:OWNER/NAME, hub:OWNER/NAME@REVISION."""
    cases: str = MISSING
    """Folder that holds CASE.npz with imgs (0 to 255), and boxes, clicks, prev_pred or text_prompts. IN on the command
    line."""
    out: str = MISSING
    """Folder for CASE.npz with segs. It is created; answers that it holds are replaced. OUT on the command line."""
    clip_model: str | None = None
    """Local folder or hub name of the CLIP model that made the model's text bank. Needed for texts that are not in the
    bank."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the points drawn again in zoom-in windows."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda, each task of a node takes its own GPU."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, otherwise fp32."""


@dataclass
class ServeConfig(Keys):
    """Serve a model to image viewers, by the HTTP protocol of nnInteractive, until interrupted."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt), exported model (.safetensors), or one on the hub: hub:OWNER/NAME, hub:OWNER/NAME@REVISION."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address other than loopback needs a key."""
    port: int = ranged(1527, least=0, below=2**16)
    """Port to listen on. 0: any free port."""
    key_file: str | None = None
    """File with the key that clients must send, readable by you alone. Without it, the environment variable
    NN_INTERACTIVE_API_KEY is used, if it is set."""
    axes: str = "SPL"
    """Directions in which the three axes of the clients' arrays grow: one letter each of R or L, A or P, S or I. SPL:
    slices from feet to head, rows from front to back, columns from right to left, as ITK reads a CT. A client can state
    others with its image."""
    max_sessions: int = ranged(4, least=1)
    """Clients at the same time. Each takes 4 bytes per voxel of its image, and zoom.cache_gb."""
    max_voxels: int = ranged(300_000_000, least=8, most=2**32)
    """Voxels of an image, at most."""
    max_body_mb: float = ranged(1024.0, above=0)
    """Size of an upload, at most (MB)."""
    idle_timeout: float = ranged(600.0, above=0)
    """Seconds without a request of the user's after which a session is given back."""
    liveness_timeout: float = ranged(60.0, above=0)
    """Seconds without a sign of life after which a session is given back. Clients report every half of this time, but
    not more often than every 5 seconds."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the points drawn again in zoom-in windows."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda, each task of a node takes its own GPU."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, otherwise fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(names_axes(self.axes), "axes", f"{self.axes} is not one letter each of R or L, A or P, S or I")
