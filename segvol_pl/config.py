"""The configuration of every verb: its schema. `segvol_pl.configure` fills it from files and `key=value`.

1. A verb's schema is a dataclass below; the docstring under each field is its help.
2. `MISSING` marks a key that has no default and must be given.
3. Loading checks names and types; `__post_init__` checks lengths and ranges.

Imports neither torch nor lightning: a wrong key must fail at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MISSING: Any = "???"
"""Stands for a value that must be given."""


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names key and remedy; `key` is the dotted key, if one."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class Rule(str, Enum):
    """One of the places where the released weights need what the published code does."""

    consistent = "consistent"
    published = "published"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Strategy(str, Enum):
    auto = "auto"
    ddp = "ddp"


class Wandb(str, Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Tail(str, Enum):
    drop = "drop"
    repeat = "repeat"


class StartMethod(str, Enum):
    fork = "fork"
    spawn = "spawn"
    forkserver = "forkserver"


class TextSource(str, Enum):
    auto = "auto"
    weights = "weights"
    clip = "clip"
    seeded = "seeded"


COMBINATIONS = ("points+text", "box+text", "text", "box", "points", "box+points")
"""The six prompt combinations of the paper's Algorithm 1, in the published order."""


def _require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {problem}", key)


def _check_triple(key: str, value: list[int]) -> None:
    _require(len(value) == 3, key, f"needs 3 numbers (d, h, w), got {len(value)}")
    _require(all(number > 0 for number in value), key, f"needs positive numbers, got {value}")


@dataclass
class SegVolConfig:
    """The architecture. The defaults are the published ViT-B (paper Sec. 2.1)."""

    input_shape: list[int] = field(default_factory=lambda: [32, 256, 256])
    """Voxels (d, h, w) that the encoder sees."""
    patch: list[int] = field(default_factory=lambda: [4, 16, 16])
    """Voxels (d, h, w) of one token."""
    hidden: int = 768
    """Width of the encoder and of the decoder."""
    layers: int = 12
    """Transformer blocks of the encoder."""
    heads: int = 12
    """Attention heads of the encoder."""
    mlp: int = 3072
    """Hidden width of the encoder's MLP."""
    decoder_layers: int = 2
    """Two-way attention blocks of the mask decoder."""
    decoder_heads: int = 8
    """Attention heads of the mask decoder."""
    decoder_mlp: int = 2048
    """Hidden width of the mask decoder's MLP."""
    text_dim: int = 512
    """Width of the text bank's vectors (CLIP ViT-B/32: 512)."""
    coordinates: Rule = Rule.consistent
    """Positional encoding of prompts and tokens. `published`: d and h are divided by each other's extent, and the
    tokens' axes are ordered h, d, w, because the released weights were trained so."""

    def __post_init__(self) -> None:
        _check_triple("model.input_shape", self.input_shape)
        _check_triple("model.patch", self.patch)
        whole = all(size % patch == 0 for size, patch in zip(self.input_shape, self.patch, strict=True))
        _require(whole, "model.input_shape", f"{self.input_shape} is not a multiple of model.patch {self.patch}")
        _require(self.hidden % self.heads == 0, "model.hidden", f"{self.hidden} is not a multiple of model.heads")
        inner = self.decoder_heads * 2
        _require(
            self.hidden % inner == 0, "model.hidden", f"{self.hidden} is not a multiple of 2 x model.decoder_heads"
        )
        _require(self.hidden % 8 == 0, "model.hidden", f"{self.hidden} is not a multiple of 8")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (d, h, w)."""
        d, h, w = (size // patch for size, patch in zip(self.input_shape, self.patch, strict=True))
        return d, h, w


@dataclass
class DataConfig:
    """Which samples are read, and how they are drawn."""

    shards: str = MISSING
    """Folder of packed shards (holds index.json), its URL (http, https, s3, gs), or `pipe:COMMAND {file}`, a command
    that prints a file of it: read from front to back, with weaker promises."""
    mix: list[str] = field(default_factory=list)
    """Further folders, each `DIR` or `WEIGHT*DIR`: how often an epoch sees each of their samples (default 1)."""
    fraction: float = 1.0
    """Share of each folder's samples to train on, by hash of their content: smaller shares lie within larger ones."""
    split: str = "train"
    """Split that training reads."""
    val_split: str = "test"
    """Split that validation reads."""
    seed: int = 0
    """Seeds the order of samples and every draw within a sample."""
    global_batch: int = 32
    """Volumes in one optimizer step, over all ranks and accumulation steps."""
    tail: Tail = Tail.drop
    """The last incomplete global batch of an epoch: left out, or completed from the epoch's start."""
    workers: int = 4
    """Loader processes per rank; 0 loads in the training process."""
    start_method: StartMethod = StartMethod.fork
    """How loader processes start: they behave alike; fork starts fastest."""
    prefetch: int = 2
    """Batches that each worker holds ready."""
    samples_per_volume: int = 1
    """How often an epoch draws from each volume, each time with another rng."""
    overview_fraction: float = 0.5
    """Share of samples that show the whole volume; the others are crops at native resolution."""
    max_bad_fraction: float = 0.001
    """Share of the corpus that may turn out damaged, and is replaced by other samples; beyond it the run ends."""
    patience: float = 60.0
    """Seconds for which a remote store that gives no answer is asked again before the run ends."""
    cache: str = ""
    """Folder on the node's own disk that keeps what was read from URLs; all processes of the node share it."""
    cache_gb: float = 100.0
    """Bytes that the cache holds at most, in GB; what was used longest ago goes first."""
    pipe_buffer: int = 16
    """Volumes that each loader process of a pipe: source holds to shuffle them."""
    flip: float = 0.2
    """Probability of a flip, for each axis."""
    intensity: float = 0.1
    """Probability of an intensity scale, and of a shift, each by up to 0.1."""

    def __post_init__(self) -> None:
        _require(self.global_batch > 0, "data.global_batch", "must be positive")
        _require(self.workers >= 0, "data.workers", "must not be negative")
        _require(self.samples_per_volume > 0, "data.samples_per_volume", "must be positive")
        _require(0 < self.fraction <= 1, "data.fraction", "is a share above 0, up to 1")
        _require(self.cache_gb > 0, "data.cache_gb", "must be positive")
        _require(self.pipe_buffer > 0, "data.pipe_buffer", "must be positive")
        _require(self.patience >= 0, "data.patience", "must not be negative")
        for name in ("overview_fraction", "flip", "intensity", "max_bad_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"data.{name}", "is a share between 0 and 1")


@dataclass
class PromptConfig:
    """How prompts are drawn from masks (paper Sec. 2.2, Algorithm 1)."""

    combinations: list[str] = field(default_factory=lambda: list(COMBINATIONS))
    """Prompt combinations that every category is trained with."""
    categories_per_volume: int = 4
    """Categories drawn from each volume in one step."""
    pseudo_per_volume: int = 6
    """Pseudo-label prompts drawn from each volume in one step; even ones are points, odd ones boxes. 0 for none."""
    extra_positive: int = 10
    """A mask gets 1 + up to this many points inside."""
    extra_negative: int = 10
    """A mask gets up to this many points outside."""
    box_jitter: float = 0.0
    """Each face of a box moves by up to this share of the box's extent (the paper jitters, its code does not)."""

    def __post_init__(self) -> None:
        _require(len(self.combinations) > 0, "prompts.combinations", "needs at least one")
        for name in self.combinations:
            _require(name in COMBINATIONS, "prompts.combinations", f"{name!r} is none of {', '.join(COMBINATIONS)}")
        _require(self.categories_per_volume > 0, "prompts.categories_per_volume", "must be positive")
        _require(self.pseudo_per_volume >= 0, "prompts.pseudo_per_volume", "must not be negative")
        _require(0 <= self.box_jitter < 0.5, "prompts.box_jitter", "is a share between 0 and 0.5")


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, by steps."""

    lr: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 1e-5
    """Weight decay of AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Moment decay rates of AdamW."""
    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    max_steps: int = MISSING
    """Optimizer steps; the cosine ends here."""
    clip_norm: float = 1.0
    """Gradient norm limit; 0 for none."""

    def __post_init__(self) -> None:
        _require(len(self.betas) == 2, "optim.betas", f"needs 2 numbers, got {len(self.betas)}")
        _require(self.max_steps == MISSING or self.max_steps > 0, "optim.max_steps", "must be positive")


@dataclass
class RunConfig:
    """Where and how a training run goes."""

    out: str = MISSING
    """Run folder: checkpoints, metrics.csv, config.yaml, manifest.json."""
    resume: bool = True
    """Go on from `out`'s last checkpoint where there is one."""
    strategy: Strategy = Strategy.auto
    """How the work is spread over devices."""
    devices: int = 1
    """Processes (GPUs, or CPU ranks) per node."""
    nodes: int = 1
    """Nodes of the job."""
    accelerator: str = "auto"
    """cpu, cuda or auto."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast where the hardware multiplies it faster, else fp32."""
    accumulate: int = 1
    """Micro-batches per optimizer step; the global batch stays as stated."""
    log_every: int = 10
    """Steps between logged metrics."""
    val_every: int = 500
    """Steps between validations; 0 for only one at the end."""
    val_batches: int = 8
    """Batches per validation."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    threads: int = 0
    """CPU threads of the math library; 0 leaves its choice."""


@dataclass
class TrackConfig:
    """Experiment tracking. metrics.csv is always written."""

    wandb: Wandb = Wandb.auto
    """auto: online with a key, else offline."""
    project: str = "segvol_pl"
    """wandb project."""
    name: str | None = None
    """Run name; none: the run folder's."""
    group: str | None = None
    """wandb group."""


@dataclass
class TextConfig:
    """Where the vectors of category names come from."""

    source: TextSource = TextSource.auto
    """clip: CLIP's text tower; weights: the bank or the text tower of the weights that training starts from; auto:
    weights where they can, else clip; seeded: fixed random vectors by name, where CLIP cannot be had."""
    clip: str = "openai/clip-vit-base-patch32"
    """Local folder or hub name of the CLIP model; of its tokenizer alone where the text tower is that of weights."""
    template: str = "A computerized tomography of a {}."
    """Sentence around a category name (paper Sec. 2.1)."""


@dataclass
class PretrainConfig:
    """SimMIM pre-training of the image encoder (paper Eq. 1)."""

    model: SegVolConfig = field(default_factory=SegVolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    mask_ratio: float = 0.6
    """Share of tokens hidden from the encoder."""

    def __post_init__(self) -> None:
        _require(0 < self.mask_ratio < 1, "mask_ratio", "is a share between 0 and 1")


@dataclass
class TrainConfig:
    """Supervised training with prompts and pseudo-labels (paper Algorithm 1)."""

    model: SegVolConfig = field(default_factory=SegVolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    pretrained: str | None = None
    """Checkpoint whose image encoder training starts from: of a pre-training run, or the released ViT."""
    weights: str | None = None
    """Whole model that training starts from (fine-tuning): own checkpoint, export, import or released file."""
    allow: list[str] = field(default_factory=list)
    """Patterns of tensor names that `weights` may lack, have beside, or have in another shape: the model's own stay."""
    pseudo_weight: float = 0.1
    """Weight of the pseudo-label loss."""

    def __post_init__(self) -> None:
        _require(self.pretrained is None or self.weights is None, "pretrained", "weights=FILE brings its own encoder")
        _require(self.pseudo_weight >= 0, "pseudo_weight", "must not be negative")


@dataclass
class ZoomConfig:
    """Zoom-out-zoom-in (paper Sec. 2.3)."""

    threshold: float = 0.5
    """Probability above which a voxel belongs to the mask."""
    overlap: float = 0.5
    """Overlap of neighbouring zoom-in windows."""
    batch: int = 2
    """Zoom-in windows encoded together."""
    points: int = 5
    """Points that a points prompt gets in each zoom-in window."""
    interpolation: Rule = Rule.consistent
    """How the volume is shrunk and the coarse logits are brought back: averaging and linear. `published`: both by
    nearest neighbour, because the released weights were validated on images shrunk so."""
    grid: Rule = Rule.consistent
    """Where zoom-in windows lie: inside the volume, whole wherever it is large enough. `published`: on a grid of each
    region of interest, which is cut off at the volume's border and padded with zeros around up to one window."""
    reflection: Rule = Rule.consistent
    """What a window is told: the user's own prompt inside it, and windows that hold nothing are skipped. `published`:
    the coarse mask's box in place of the user's, points drawn from the enlarged user's points, no window skipped."""

    def __post_init__(self) -> None:
        _require(0 <= self.overlap < 1, "zoom.overlap", "is a share between 0 and 1")
        _require(0 < self.threshold < 1, "zoom.threshold", "is a probability between 0 and 1")


@dataclass
class CasesConfig:
    """The packed cases that an evaluation reads."""

    shards: str = MISSING
    """Folder of packed shards (holds index.json)."""
    split: str = "test"
    """Split to evaluate; `all` for every sample."""


@dataclass
class EvaluateConfig:
    """Zoom-out-zoom-in over a split of shards: rows, tables, report."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt) or exported model (.safetensors)."""
    data: CasesConfig = field(default_factory=CasesConfig)
    out: str = MISSING
    """Folder of rows.csv, summary.json and report.html."""
    prompts: list[str] = field(default_factory=lambda: ["text", "box+text", "points+text"])
    """Prompt combinations to evaluate; spatial prompts are drawn from the truth, and the report says so."""
    categories: list[str] = field(default_factory=list)
    """Categories to evaluate; none: all that a case holds."""
    seed: int = 0
    """Seeds the drawn points."""
    limit: int = 0
    """Cases at most; 0 for all."""
    pictures: int = 6
    """Cases pictured in the report."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """cpu, cuda or auto."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast where the hardware multiplies it faster, else fp32."""

    def __post_init__(self) -> None:
        _require(len(self.prompts) > 0, "prompts", "needs at least one")
        for name in self.prompts:
            _require(name in COMBINATIONS, "prompts", f"{name!r} is none of {', '.join(COMBINATIONS)}")


@dataclass
class PredictConfig:
    """One CT in, one mask on its own grid out."""

    checkpoint: str = MISSING
    """Checkpoint (.ckpt) or exported model (.safetensors)."""
    image: str = MISSING
    """CT: NIfTI, NRRD, MHA or a DICOM folder."""
    out: str = MISSING
    """Mask to write (.nii.gz, .nii, .nrrd, .mha)."""
    text: str | None = None
    """Category name."""
    box: list[int] | None = None
    """d0 h0 w0 d1 h1 w1: voxels of the CT in canonical axes (superior, anterior, right), inclusive maximum."""
    points: list[list[int]] | None = None
    """Rows of d h w label: voxels as for box; label 1 inside, 0 outside."""
    seed: int = 0
    """Seeds the points re-drawn in zoom-in windows."""
    zoom: ZoomConfig = field(default_factory=ZoomConfig)
    device: str = "auto"
    """cpu, cuda or auto."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast where the hardware multiplies it faster, else fp32."""

    def __post_init__(self) -> None:
        prompted = any(given is not None for given in (self.text, self.box, self.points))
        _require(prompted, "text", "give at least one of text, box, points")
        if self.box is not None:
            _require(len(self.box) == 6, "box", f"needs 6 numbers d0 h0 w0 d1 h1 w1, got {len(self.box)}")
        for row in self.points or []:
            _require(len(row) == 4, "points", f"each row needs d h w label, got {row}")


@dataclass
class RegionsConfig:
    """Pseudo-label regions (3-D Felzenszwalb-Huttenlocher) computed at packing."""

    enabled: bool = True
    """Compute them."""
    sigma: float = 0.8
    """Gaussian smoothing before the graph is built, in voxels of the overview."""
    min_size: int = 1000
    """Regions under this many voxels are merged (at 32 x 256 x 256)."""
    min_fraction: float = 0.001
    """Regions under this share of the voxels are dropped."""

    def __post_init__(self) -> None:
        _require(self.sigma >= 0, "regions.sigma", "must not be negative")
        _require(self.min_size >= 1, "regions.min_size", "must be positive")
        _require(2e-5 <= self.min_fraction < 1, "regions.min_fraction", "is a share between 0.00002 and 1")


def parse_slice(text: str) -> tuple[int, int]:
    """K/N as two numbers. Raises ConfigError unless 0 <= K < N."""
    number, _, count = text.partition("/")
    _require(
        number.isdecimal() and count.isdecimal() and int(number) < int(count), "slice", f"{text!r} is not K/N, K < N"
    )
    return int(number), int(count)


@dataclass
class PackConfig:
    """CT files into tar shards."""

    images: str | None = None
    """A CT file, a DICOM folder, a folder of cases or a glob."""
    labels: str | None = None
    """Label maps, given likewise; paired by case id."""
    cases: str | None = None
    """CSV or JSON that states the pairs: id, image, label; or id, image and a column of files for each category."""
    categories: str | None = None
    """YAML: category name -> label values. Needed where there are label maps."""
    slice: str = ""
    """K/N: stage the K-th (from 0) of N parts of the cases alone, e.g. as a task of a SLURM array; a run without it
    joins them."""
    out: str = MISSING
    """Folder of the shards and index.json."""
    dataset: str = "unnamed"
    """Name of the data set, written to every sample."""
    modality: str = "CT"
    """Modality, written to every sample."""
    overview_shape: list[int] = field(default_factory=lambda: [32, 256, 256])
    """Shape (d, h, w) of the stored overview: the model's input shape."""
    samples_per_shard: int = 32
    """Samples in one tar."""
    test_fraction: float = 0.2
    """Share of cases, by hash of their content, that are the test split."""
    max_bad_fraction: float = 0.05
    """Share of unusable cases beyond which packing fails."""
    anchors: int = 64
    """Voxels of each category written down as centres for foreground crops."""
    workers: int = 0
    """Processes; 0 takes one per core."""
    regions: RegionsConfig = field(default_factory=RegionsConfig)

    def __post_init__(self) -> None:
        _check_triple("overview_shape", self.overview_shape)
        given = self.images is not None or self.cases is not None
        _require(given, "images", "give images=FILE_OR_FOLDER_OR_GLOB or cases=FILE")
        _require(0 <= self.test_fraction <= 1, "test_fraction", "is a share between 0 and 1")
        _require(self.samples_per_shard > 0, "samples_per_shard", "must be positive")
        if self.slice:
            parse_slice(self.slice)
        labelled = self.labels is None or self.categories is not None
        _require(labelled, "categories", "labels need categories=FILE (YAML: name -> label values)")


@dataclass
class DemoConfig:
    """The main job on phantoms: pack, pre-train, train, evaluate, report."""

    out: str = "runs/demo"
    """Folder of everything that the demo writes."""
    volumes: int = 48
    """Phantoms to make."""
    pretrain_steps: int = 200
    """SimMIM steps."""
    train_steps: int = 1800
    """Supervised steps."""
    seed: int = 0
    """Seeds phantoms and training."""


@dataclass
class ImportConfig:
    """Released weights (.pth, .bin, .safetensors, the pre-trained ViT's .ckpt) into a .safetensors for every verb."""

    source: str = MISSING
    """Released file: SRC on the command line."""
    out: str = MISSING
    """File to write, .safetensors: DST on the command line."""
    categories: str | None = None
    """YAML whose category names the text bank gets, through the text tower in the file; none: no text prompts."""
    model: SegVolConfig = field(default_factory=lambda: SegVolConfig(coordinates=Rule.published))
    """The architecture that the file must have."""
    text: TextConfig = field(default_factory=TextConfig)
    allow: list[str] = field(default_factory=list)
    """Patterns of tensor names that may be missing, unknown or of another shape; otherwise any such is refused."""


SCHEMAS: dict[str, type] = {
    "demo": DemoConfig,
    "pack": PackConfig,
    "pretrain": PretrainConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "import": ImportConfig,
}
