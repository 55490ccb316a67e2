"""Pre-training and training: optimizer, run folder, ranks, tracking."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.data import DataConfig, PromptConfig, landmarks_in
from segvol_pl.config.fields import MISSING, Keys, check_custom, ranged, require
from segvol_pl.config.model import Precision, SegVolConfig, TextConfig


class Strategy(StrEnum):
    """How weights, gradients and optimizer lie over the ranks."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class Recompute(StrEnum):
    """Which activations the backward pass computes again."""

    none = "none"
    cheap = "cheap"
    blocks = "blocks"


class Wandb(StrEnum):
    """Where a run at wandb is written, if anywhere."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


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
        require(len(self.betas) == 2, "optim.betas", f"needs 2 numbers, got {len(self.betas)}")


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
        require(
            self.strategy is not Strategy.zero1 or self.accumulate == 1,
            "run.accumulate",
            "is 1 with zero1, under which micro-batches gave other gradients: take zero2",
        )
        check_custom("run.custom_strategy", [self.custom_strategy] if self.custom_strategy else [])
        alone = self.strategy is Strategy.auto or not self.custom_strategy
        require(alone, "run.custom_strategy", f"stands in place of run.strategy={self.strategy.value}: leave one out")
        kept = self.recompute is not Recompute.cheap or self.strategy is not Strategy.zero3
        require(kept, "run.recompute", "cheap would give wrong gradients with zero3: use blocks")
        # DeepSpeed gathers weights by hooks within the blocks.
        hooked = self.strategy is Strategy.zero3
        require(not (hooked and self.compile), "run.compile", "does not go with zero3: use fsdp, ddp, zero1 or zero2")
        splits = self.strategy not in (Strategy.auto, Strategy.ddp)
        require(splits or not self.offload, "run.offload", "needs a strategy that splits: fsdp, zero1, zero2, zero3")


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
        require(self.pretrained is None or self.weights is None, "pretrained", "weights=FILE brings its own encoder")
        for name in landmarks_in(self.prompts.combinations):
            require(
                name in self.model.landmark_counts,
                "prompts.combinations",
                f"{name!r} is not among model.landmarks: add N*{name}",
            )
