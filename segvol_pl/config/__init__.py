"""The configuration of every command: its schema. `segvol_pl.config.loader` fills it from files and `key=value`.

1. A command's schema is a dataclass below; the docstring under each field is its help.
2. `MISSING` marks a key that has no default and must be given.
3. A number's range stands at its field, as `ranged(default, least=1)`. `__post_init__` checks lengths, and keys against
   each other.
4. Loading checks names and types; building checks the rest.

Imports neither torch nor lightning: a wrong key must fail at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from segvol_pl.errors import ConfigError

MISSING: Any = "???"
"""Stands for a value that must be given."""


BUNDLED = ("configs", "slurm", "shards/datasets")
"""Folders of the repository that a wheel carries too, and that `segvol-pl init DIR` lays out."""


class Convention(str, Enum):
    """One of the places where the released weights need what the published code does."""

    consistent = "consistent"
    published = "published"


class Coordinates(str, Enum):
    """What numbers of a prompt's box and points are: voxels in canonical axes, or millimetres of RAS or LPS."""

    voxel = "voxel"
    ras = "ras"
    lps = "lps"


class Overlaps(str, Enum):
    """Whose voxels they are that several categories claim."""

    probability = "probability"
    order = "order"


class Precision(str, Enum):
    """What products are computed in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Strategy(str, Enum):
    """How weights, gradients and optimizer lie over the ranks."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class Recompute(str, Enum):
    """Which activations the backward pass computes again."""

    none = "none"
    cheap = "cheap"
    blocks = "blocks"


class Wandb(str, Enum):
    """Where a run at wandb is written, if anywhere."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Mode(str, Enum):
    """How a prompt becomes a mask of the whole volume (paper Table 3)."""

    zoom = "zoom"
    resize = "resize"
    sliding = "sliding"


class Blend(str, Enum):
    """How sliding windows count where they overlap."""

    constant = "constant"
    gaussian = "gaussian"


class Timing(str, Enum):
    """Whether a row's seconds hold what earlier prompts of the case have encoded."""

    shared = "shared"
    cold = "cold"


class Slice(str, Enum):
    """The axial slice that a box of one slice is drawn on."""

    largest = "largest"
    middle = "middle"


class LastBatch(str, Enum):
    """What becomes of an epoch's last incomplete global batch."""

    drop = "drop"
    repeat = "repeat"


class StartMethod(str, Enum):
    """How loader processes start."""

    auto = "auto"
    fork = "fork"
    spawn = "spawn"
    forkserver = "forkserver"


class TextSource(str, Enum):
    """Where the vectors of category names come from."""

    auto = "auto"
    weights = "weights"
    clip = "clip"
    seeded = "seeded"


class DataCount(str, Enum):
    """What D of a scaling law counts."""

    seen = "seen"
    volumes = "volumes"


class MetricPick(str, Enum):
    """Which value of a metric is a run's."""

    last = "last"
    best = "best"


BOX_SOURCES = ("exact", "jittered", "slice")
"""How well an evaluation draws a box from the truth."""

CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A function of the user's own, as `package.module:function`; `configure.custom_function` finds it."""

LANDMARKS = re.compile(rf"([1-9]\d*)\*({CUSTOM.pattern})")
"""A kind of prompt of the user's own, as `N*package.module:function`: the function marks N voxels of a structure."""

EVERY_CATEGORY = "all"
"""As the only text of a prediction: every category that the model knows."""

COMBINATIONS = ("points+text", "box+text", "text", "box", "points", "box+points")
"""The six prompt combinations of the paper's Algorithm 1, in the published order."""

PARTS = ("text", "points", "box")
"""What a combination is put together from, beside landmarks of the user's own."""

HIGHEST_SEED = 2**63 - 1
"""Of what numpy and torch both take."""

MASK_TOKENS = 4
"""Of the mask decoder, as in SAM; SegVol reads its mask off the first one alone."""

DEEPSPEED_BUCKET = 50_000_000
"""Elements that DeepSpeed sends at once: a quarter of the model; its default of 5e8 would reserve 2 GB."""

MAY_CHANGE = (
    "run",
    "track",
    "data.workers",
    "data.prefetch",
    "data.start_method",
    "data.retry_seconds",
    "data.cache",
    "data.pipe_buffer",
    "data.max_bad_fraction",
    "data.shards",
    "data.mix",
    "pretrained",
    "weights",
    "allow",
)
"""Keys that may differ between a run and its resumption: they change no batch and no weight. What `data.shards` and
`data.mix` hold may not change, see `run.resume`."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes: finite ones within the bounds that are given."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        # NaN is neither above nor below anything.
        return (
            -math.inf < number < math.inf
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        given = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        return " and ".join(given) or "a finite number"


def ranged(default: Any, **bounds: float) -> Any:
    """A key that holds a number, or a list of numbers, within bounds: see `Range`."""
    metadata = {"range": Range(**bounds)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Keys:
    """A schema, or a section of one. Its numbers lie within their ranges (ConfigError)."""

    section: ClassVar[str] = ""
    """What stands before its keys."""

    def __post_init__(self) -> None:
        for key in fields(self):
            for number in _numbers(getattr(self, key.name)) if "range" in key.metadata else ():
                problem = f"must be {key.metadata['range']}, got {number}"
                _require(number in key.metadata["range"], f"{self.section}{key.name}", problem)


def _numbers(value: Any) -> Iterator[float]:
    """Those of a key's value; none where there is none yet."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif value is not None and value != MISSING:
        yield value


def _require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {problem}", key)


def _check_combinations(key: str, names: Sequence[str]) -> None:
    _require(len(names) > 0, key, "needs at least one")
    for name in names:
        parts, own = named_parts(name), landmarks_in([name])
        marked = len(set(parts)) == len(parts) and all(CUSTOM.fullmatch(part) for part in own)
        fits = marked if own else name in COMBINATIONS
        _require(fits, key, f"{name!r} is none of {', '.join(COMBINATIONS)}, nor has it marks of model.landmarks")


def named_parts(combination: str) -> list[str]:
    """`box+text` -> box, text."""
    return combination.split("+")


def landmarks_in(combinations: Sequence[str]) -> list[str]:
    """The user's own kinds of prompts in them, in the order of the first of each."""
    return list(dict.fromkeys(part for name in combinations for part in named_parts(name) if part not in PARTS))


def _check_custom(key: str, names: Sequence[str], others: Sequence[str] = ()) -> None:
    known = f"none of {', '.join(others)} nor" if others else "not"
    for name in names:
        _require(CUSTOM.fullmatch(name) is not None, key, f"{name!r} is {known} a function as package.module:function")


def _check_triple(key: str, value: list[int]) -> None:
    _require(len(value) == 3, key, f"needs 3 numbers (d, h, w), got {len(value)}")


@dataclass
class SegVolConfig(Keys):
    """The architecture. The defaults are the published ViT-B (paper Sec. 2.1)."""

    section = "model."

    input_shape: list[int] = ranged([32, 256, 256], least=1)
    """Voxels (d, h, w) that the encoder sees."""
    patch_size: list[int] = ranged([4, 16, 16], least=1)
    """Voxels (d, h, w) of one token."""
    hidden_size: int = ranged(768, least=1)
    """Width of the encoder and of the decoder."""
    num_layers: int = ranged(12, least=1)
    """Transformer blocks of the encoder."""
    num_heads: int = ranged(12, least=1)
    """Attention heads of the encoder."""
    mlp_dim: int = ranged(3072, least=1)
    """Hidden width of the encoder's MLP."""
    decoder_layers: int = ranged(2, least=1)
    """Two-way attention blocks of the mask decoder."""
    decoder_heads: int = ranged(8, least=1)
    """Attention heads of the mask decoder."""
    decoder_mlp_dim: int = ranged(2048, least=1)
    """Hidden width of the mask decoder's MLP."""
    text_dim: int = ranged(512, least=1)
    """Width of the text bank's vectors (CLIP ViT-B/32: 512)."""
    coordinates: Convention = Convention.consistent
    """Positional encoding of prompts and tokens. `published`: d and h are divided by each other's extent, and the
    tokens' axes are ordered h, d, w, because the released weights were trained so."""
    landmarks: list[str] = field(default_factory=list)
    """Kinds of prompts of one's own, each `N*package.module:function`: N voxels that the function marks, with an
    embedding each, as a box has for its corners. Combinations name them without `N*`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.landmarks:
            _require(
                LANDMARKS.fullmatch(entry) is not None, "model.landmarks", f"{entry!r} is no N*package.module:function"
            )
        _require(len(self.landmark_counts) == len(self.landmarks), "model.landmarks", "names a function twice")
        _check_triple("model.input_shape", self.input_shape)
        _check_triple("model.patch_size", self.patch_size)
        whole = all(size % patch == 0 for size, patch in zip(self.input_shape, self.patch_size, strict=True))
        _require(
            whole, "model.input_shape", f"{self.input_shape} is not a multiple of model.patch_size {self.patch_size}"
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            "model.hidden_size",
            f"{self.hidden_size} is not a multiple of model.num_heads",
        )
        inner = self.decoder_heads * 2
        _require(
            self.hidden_size % inner == 0,
            "model.hidden_size",
            f"{self.hidden_size} is not a multiple of 2 x model.decoder_heads",
        )
        _require(self.hidden_size % 8 == 0, "model.hidden_size", f"{self.hidden_size} is not a multiple of 8")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (d, h, w)."""
        d, h, w = (size // patch for size, patch in zip(self.input_shape, self.patch_size, strict=True))
        return d, h, w

    @property
    def landmark_counts(self) -> dict[str, int]:
        """`package.module:function` -> the number of voxels that it marks, of all kinds of `landmarks`."""
        found = (LANDMARKS.fullmatch(entry) for entry in self.landmarks)
        return {match[2]: int(match[1]) for match in found if match}


@dataclass
class DataConfig(Keys):
    """Which samples are read, and how they are drawn."""

    section = "data."

    shards: str = MISSING
    """Folder of packed shards (holds index.json), its URL (http, https, s3, gs), or `pipe:COMMAND {file}`, a command
    that prints a file of it: read from front to back, with weaker promises."""
    mix: list[str] = field(default_factory=list)
    """Further folders, each `DIR` or `WEIGHT*DIR`: how often an epoch sees each of their samples (default 1)."""
    fraction: float = ranged(1.0, above=0, most=1)
    """Share of each folder's samples to train on, by hash of their content: smaller shares lie within larger ones."""
    split: str = "train"
    """Split that training reads."""
    val_split: str = "test"
    """Split that validation reads."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seeds the order of samples and every draw within a sample."""
    global_batch: int = ranged(32, least=1)
    """Volumes in one optimizer step, over all ranks and accumulation steps."""
    last_batch: LastBatch = LastBatch.drop
    """The last incomplete global batch of an epoch: left out, or completed from the epoch's start."""
    workers: int = ranged(4, least=0)
    """Loader processes per rank; 0 loads in the training process."""
    start_method: StartMethod = StartMethod.auto
    """How loader processes start: they behave alike, and fork starts fastest. auto: fork on CPUs; forkserver on GPUs,
    where the training process has threads of CUDA and NCCL, which a forked copy of it may wait for without end."""
    prefetch: int = ranged(2, least=1)
    """Batches that each worker holds ready."""
    samples_per_volume: int = ranged(1, least=1)
    """How often an epoch draws from each volume, each time with another rng."""
    overview_fraction: float = ranged(0.5, least=0, most=1)
    """Share of samples that show the whole volume; the others are crops at native resolution."""
    max_bad_fraction: float = ranged(0.001, least=0, most=1)
    """Share of the corpus that may turn out damaged, and is replaced by other samples; beyond it the run ends."""
    retry_seconds: float = ranged(60.0, least=0)
    """Seconds for which a folder or a URL that cannot be read is tried again before the run ends."""
    cache: str = ""
    """Folder on the node's own disk that keeps what was read from URLs; all processes of the node share it."""
    cache_gb: float = ranged(100.0, above=0)
    """Bytes that the cache holds at most, in GB; what was used longest ago goes first."""
    pipe_buffer: int = ranged(16, least=1)
    """Volumes that each loader process of a pipe: source holds to shuffle them."""
    flip: float = ranged(0.2, least=0, most=1)
    """Probability of a flip, for each axis."""
    intensity: float = ranged(0.1, least=0, most=1)
    """Probability of an intensity scale, and of a shift, each by up to 0.1."""


@dataclass
class PromptConfig(Keys):
    """How prompts are drawn from masks (paper Sec. 2.2, Algorithm 1)."""

    section = "prompts."

    combinations: list[str] = field(default_factory=lambda: list(COMBINATIONS))
    """Prompt combinations that every category is trained with."""
    categories_per_volume: int = ranged(4, least=1)
    """Categories drawn from each volume in one step."""
    pseudo_per_volume: int = ranged(6, least=0)
    """Pseudo-label prompts drawn from each volume in one step; even ones are points, odd ones boxes. 0 for none."""
    extra_positive: int = ranged(10, least=0)
    """A mask gets 1 + up to this many points inside."""
    extra_negative: int = ranged(10, least=0)
    """A mask gets up to this many points outside."""
    box_jitter: float = ranged(0.0, least=0, below=0.5)
    """Each face of a box moves by up to this share of the box's extent (the paper jitters, its code does not)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_combinations("prompts.combinations", self.combinations)


@dataclass
class OptimConfig(Keys):
    """AdamW with linear warm-up and cosine decay, by steps."""

    section = "optim."

    lr: float = ranged(1e-4, least=0)
    """Peak learning rate."""
    weight_decay: float = ranged(1e-5, least=0)
    """Weight decay of AdamW."""
    betas: list[float] = ranged([0.9, 0.999], least=0, below=1)
    """Moment decay rates of AdamW."""
    warmup_steps: int = ranged(1000, least=0)
    """Steps of linear warm-up."""
    max_steps: int = ranged(MISSING, least=1)
    """Optimizer steps; the cosine ends here."""
    clip_norm: float = ranged(1.0, least=0)
    """Gradient norm limit; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(self.betas) == 2, "optim.betas", f"needs 2 numbers, got {len(self.betas)}")


@dataclass
class RunConfig(Keys):
    """Where and how a training run goes."""

    section = "run."

    out: str = MISSING
    """Run folder: checkpoints, metrics.csv, config.yaml, manifest.json."""
    resume: bool = True
    """Go on from `out`'s last checkpoint where there is one."""
    strategy: Strategy = Strategy.auto
    """auto: one process, or ddp; ddp: whole model on each; fsdp: FSDP2, weights, gradients and optimizer split block by
    block; zero1, zero2, zero3: DeepSpeed, optimizer, also gradients, also weights split."""
    custom_strategy: str = ""
    """package.module:function of your own in place of `strategy`: it makes Lightning's strategy of these settings."""
    offload: bool = False
    """fsdp, zero: keep what is split in main memory."""
    devices: int = ranged(1, least=1)
    """Processes (GPUs, or CPU ranks) per node."""
    nodes: int = ranged(1, least=1)
    """Nodes of the job."""
    accelerator: str = "auto"
    """cpu, cuda or auto."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, else fp32."""
    tf32: bool = False
    """Let GPUs multiply float32 matrices as TF32, of 10 bits, where bf16 is not taken: with precision=fp32 all of them.
    The trilinear weights of upsampling are exact in it."""
    deterministic: bool = False
    """Let torch take only operations that it holds for deterministic, on GPUs too, where they are slower. On the GPU
    that was tried this made losses equal to the bit, not every weight; CPUs need no such key."""
    accumulate: int = ranged(1, least=1)
    """Micro-batches per optimizer step; the global batch stays as stated."""
    prompts_at_once: int = ranged(0, least=0)
    """Prompts of each volume that are decoded together: bounds memory, whatever their number. The losses are the
    same. 0: on a GPU as many as its memory allows, on a CPU 6."""
    recompute: Recompute = Recompute.none
    """Activations of the encoder's blocks that are computed again in the backward pass in place of being held. cheap:
    all but the results of matrix products and attention (not with zero3); blocks: everything within a block, at a third
    more time."""
    compile: bool = False
    """Compile the encoder's blocks and the decoder with torch.compile: the first steps take up to minutes longer, the
    others less time. Under fsdp the encoder's blocks alone; not with zero3."""
    peak_tflops: float = ranged(0.0, least=0)
    """Peak of one device's matrix products in TFLOP/s, against which MFU is stated; 0: that of the table in
    segvol_pl/planning/devices.py for bf16, and no MFU where it is not known."""
    profile: int = ranged(0, least=0)
    """Steps to profile, from the sixth on: a chrome trace of rank 0 in the run folder. 0 for none."""
    log_every: int = ranged(10, least=1)
    """Steps between logged metrics."""
    val_every: int = ranged(500, least=0)
    """Steps between validations; 0 for only one at the end."""
    val_batches: int = ranged(8, least=0)
    """Batches per validation; 0 for no validation."""
    checkpoint_every: int = ranged(500, least=1)
    """Steps between checkpoints that a run goes on from; each replaces the one before."""
    checkpoint_minutes: float = ranged(0.0, least=0)
    """Minutes after which such a checkpoint is written even so, by the clock of rank 0; 0: by steps alone."""
    save_every: int = ranged(0, least=0)
    """Steps between checkpoints that are kept beside; 0 for none."""
    keep_last: int = ranged(3, least=1)
    """Of those, how many of the newest stay."""
    max_bad_steps: int = ranged(0, least=0)
    """Steps in a row whose loss or gradients are NaN or infinite that are skipped; one more ends the run."""
    cpu_threads: int = ranged(0, least=0)
    """CPU threads of the math library; 0 leaves its choice."""
    requeue: bool = True
    """Ask SLURM to queue the job again when it is signalled (SIGUSR1, SIGTERM)."""
    hang_timeout: float = ranged(1800.0, above=0, most=10**9)
    """Seconds without any progress after which a rank that hangs is named and the job ends. First steps that compile,
    and saving, must fit in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.strategy is not Strategy.zero1 or self.accumulate == 1,
            "run.accumulate",
            "is 1 with zero1, under which micro-batches gave other gradients: take zero2",
        )
        _check_custom("run.custom_strategy", [self.custom_strategy] if self.custom_strategy else [])
        alone = self.strategy is Strategy.auto or not self.custom_strategy
        _require(alone, "run.custom_strategy", f"stands in place of run.strategy={self.strategy.value}: leave one out")
        kept = self.recompute is not Recompute.cheap or self.strategy is not Strategy.zero3
        _require(kept, "run.recompute", "cheap would give wrong gradients with zero3: use blocks")
        # DeepSpeed gathers weights by hooks within the blocks.
        hooked = self.strategy is Strategy.zero3
        _require(not (hooked and self.compile), "run.compile", "does not go with zero3: use fsdp, ddp, zero1 or zero2")
        splits = self.strategy not in (Strategy.auto, Strategy.ddp)
        _require(splits or not self.offload, "run.offload", "needs a strategy that splits: fsdp, zero1, zero2, zero3")


@dataclass
class TrackConfig(Keys):
    """Experiment tracking. metrics.csv is always written."""

    section = "track."

    wandb: Wandb = Wandb.auto
    """auto: online with a key, else offline."""
    project: str = "segvol_pl"
    """wandb project."""
    name: str | None = None
    """Run name; none: the run folder's."""
    group: str | None = None
    """wandb group."""


@dataclass
class TextConfig(Keys):
    """Where the vectors of category names come from."""

    section = "text."

    source: TextSource = TextSource.auto
    """clip: CLIP's text tower; weights: the bank or the text tower of the weights that training starts from; auto:
    weights where they can, else clip; seeded: fixed random vectors by name, where CLIP cannot be had."""
    clip_model: str = "openai/clip-vit-base-patch32"
    """Local folder or hub name of the CLIP model; of its tokenizer alone where the text tower is that of weights."""
    template: str = "A computerized tomography of a {}."
    """Sentence around a category name (paper Sec. 2.1)."""


@dataclass
class PretrainConfig(Keys):
    """SimMIM pre-training of the image encoder (paper Eq. 1)."""

    model: SegVolConfig = field(default_factory=SegVolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    mask_ratio: float = ranged(0.6, above=0, below=1)
    """Share of tokens hidden from the encoder."""


@dataclass
class TrainConfig(Keys):
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
    freeze: list[str] = field(default_factory=list)
    """Patterns of tensor names that do not train, as `image_encoder.*`: they cost neither gradients nor moments."""
    pseudo_weight: float = ranged(0.1, least=0)
    """Weight of the pseudo-label loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.pretrained is None or self.weights is None, "pretrained", "weights=FILE brings its own encoder")
        for name in landmarks_in(self.prompts.combinations):
            _require(
                name in self.model.landmark_counts,
                "prompts.combinations",
                f"{name!r} is not among model.landmarks: add N*{name}",
            )


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
        _require(not (self.shards and self.files), "data.shards", "and data.images or data.cases: give one of them")
        labelled = self.labels is None or self.categories is not None
        _require(labelled, "data.categories", "labels need data.categories=FILE (YAML: name -> label values)")

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
        _require(len(self.boxes) > 0, "draw.boxes", "needs at least one")
        _require(len(self.points) > 0, "draw.points", "needs at least one")
        _check_custom("draw.boxes", [name for name in self.boxes if name not in BOX_SOURCES], BOX_SOURCES)
        _check_custom("draw.points", [name for name in self.points if not points_drawn(name)], ("centre", "randomN"))


def points_drawn(name: str) -> int:
    """Points inside that one of `draw.points` means; 0 where it means nothing."""
    number = name.removeprefix("random")
    return 1 if name == "centre" else int(number) if name.startswith("random") and number.isdecimal() else 0


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
        _require(given, "data.shards", "give data.shards=DIR, or data.images=... or data.cases=FILE for CT files")
        _require(len(self.modes) > 0, "modes", "needs at least one")
        _check_combinations("prompts", self.prompts)
        _check_custom("metrics", self.metrics)
        names = {name.rpartition(":")[2] for name in self.metrics}
        _require(len(names) == len(self.metrics), "metrics", "gives two functions of one name")
        if self.part:
            parse_part(self.part)


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
        _require(bool(self.text or self.box or self.points), "text", "give at least one of text, box, points")
        _require(len(set(self.text)) == len(self.text), "text", "names a category twice")
        if len(self.text) > 1 or self.everything:
            _require(not spatial, "text", f"several categories are asked by text alone, leave {', '.join(spatial)} out")
        if self.box is not None:
            _require(len(self.box) == 6, "box", f"needs 6 numbers d0 h0 w0 d1 h1 w1, got {len(self.box)}")
        for row in self.points or []:
            _require(len(row) == 4, "points", f"each row needs d h w label, got {row}")


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


@dataclass
class RegionsConfig(Keys):
    """Pseudo-label regions (3-D Felzenszwalb-Huttenlocher) computed at packing."""

    section = "regions."

    enabled: bool = True
    """Compute them."""
    sigma: float = ranged(0.8, least=0)
    """Gaussian smoothing before the graph is built, in voxels of the overview."""
    min_size: int = ranged(1000, least=1)
    """Regions under this many voxels are merged (at 32 x 256 x 256)."""
    min_fraction: float = ranged(0.001, least=2e-5, below=1)
    """Regions under this share of the voxels are dropped."""


def parse_part(text: str) -> tuple[int, int]:
    """K/N as two numbers. Raises ConfigError unless 0 <= K < N."""
    number, _, count = text.partition("/")
    _require(
        number.isdecimal() and count.isdecimal() and int(number) < int(count), "part", f"{text!r} is not K/N, K < N"
    )
    return int(number), int(count)


@dataclass
class PackConfig(Keys):
    """CT files into tar shards."""

    images: str | None = None
    """A CT file, a DICOM folder, a folder of cases or a glob."""
    labels: str | None = None
    """Label maps, given likewise; paired by case id."""
    cases: str | None = None
    """CSV or JSON that states the pairs: id, image, label; or id, image and a column of files for each category; or the
    CODE.json of a set in the processed M3D-Seg form."""
    recipe: str | None = None
    """YAML of a public data set, see shards/datasets/: names its files below images=ROOT and its categories."""
    categories: str | None = None
    """YAML: category name -> label values. Needed where there are label maps."""
    part: str = ""
    """K/N: stage the K-th (from 0) of N parts of the cases alone, e.g. as a task of a SLURM array; a run without it
    joins them."""
    out: str = MISSING
    """Folder of the shards and index.json."""
    dataset: str = ""
    """Name of the data set, written to every sample. Empty: the recipe's, else unnamed."""
    modality: str = ""
    """Modality, written to every sample. Empty: the recipe's, else CT."""
    overview_shape: list[int] = ranged([32, 256, 256], least=1)
    """Shape (d, h, w) of the stored overview: the model's input shape."""
    samples_per_shard: int = ranged(32, least=1)
    """Samples in one tar."""
    test_fraction: float = ranged(0.2, least=0, most=1)
    """Share of cases, by hash of their content, that are the test split."""
    max_bad_fraction: float = ranged(0.05, least=0, most=1)
    """Share of unusable cases beyond which packing fails."""
    anchors: int = ranged(64, least=1)
    """Voxels of each category written down as centres for foreground crops."""
    workers: int = ranged(0, least=0)
    """Processes; 0 takes one per core."""
    regions: RegionsConfig = field(default_factory=RegionsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_triple("overview_shape", self.overview_shape)
        given = self.images is not None or self.cases is not None
        _require(given, "images", "give images=FILE_OR_FOLDER_OR_GLOB or cases=FILE")
        if self.part:
            parse_part(self.part)
        labelled = self.labels is None or self.categories is not None
        _require(labelled, "categories", "labels need categories=FILE (YAML: name -> label values)")
        _require(not (self.recipe and self.labels), "labels", "the recipe says where they are: leave labels out")


@dataclass
class InventoryConfig(Keys):
    """List what lies in a folder tree or a list of cases, by the headers alone."""

    images: str | None = None
    """A folder, searched with all below it, a CT file or a glob."""
    cases: str | None = None
    """CSV or JSON that lists cases, as for pack."""
    out: str = "inventory.json"
    """Where all of it is written; empty: nowhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require((self.images is None) != (self.cases is None), "images", "give one of images=FOLDER and cases=FILE")


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
        _require(self.device in ("auto", "cpu", "cuda"), "device", f"{self.device!r} is none of auto, cpu, cuda")


@dataclass
class ImportConfig(Keys):
    """Convert released weights (.pth, .bin, .safetensors, the ViT's .ckpt) to a .safetensors for every command."""

    source: str = MISSING
    """Released file: SRC on the command line."""
    out: str = MISSING
    """File to write, .safetensors: DST on the command line."""
    categories: str | None = None
    """YAML whose category names the text bank gets, through the text tower in the file; none: no text prompts."""
    model: SegVolConfig = field(default_factory=lambda: SegVolConfig(coordinates=Convention.published))
    """The architecture that the file must have."""
    text: TextConfig = field(default_factory=TextConfig)
    allow: list[str] = field(default_factory=list)
    """Patterns of tensor names that may be missing, unknown or of another shape; otherwise any such is refused."""


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
        _require(bool(self.runs) or self.table is not None, "runs", "give run folders, or table=CSV")


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


SCHEMAS: dict[str, type] = {
    "demo": DemoConfig,
    "inventory": InventoryConfig,
    "pack": PackConfig,
    "pretrain": PretrainConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "view": ViewConfig,
    "import": ImportConfig,
    "scaling fit": FitConfig,
    "scaling compare": CompareConfig,
}
