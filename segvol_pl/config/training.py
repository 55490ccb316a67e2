"""The schemas of pre-training and training: optimizer, run, tracking."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase

from segvol_pl.config.data import DataConfig, PromptConfig, landmarks_in
from segvol_pl.config.fields import MISSING, Keys, check_custom, ranged, require
from segvol_pl.config.model import FINER, SHIPPED_LANDMARKS, Precision, SegVolConfig, TextConfig, check_widths


class Strategy(StrEnum):
    """How to distribute weights, gradients and optimizer state over the ranks."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"


class Schedule(StrEnum):
    """The learning rate after the warm-up."""

    cosine = "cosine"
    wsd = "wsd"


class DecayShape(StrEnum):
    """How the learning rate falls at the end of the schedule wsd."""

    sqrt = "sqrt"
    linear = "linear"
    cosine = "cosine"


class CheckpointFormat(StrEnum):
    """How to write checkpoints."""

    full = "full"
    sharded = "sharded"


class Recompute(StrEnum):
    """Which activations to recompute in the backward pass."""

    none = "none"
    cheap = "cheap"
    blocks = "blocks"


class Transfer(StrEnum):
    """How initial weights and learning rates depend on the width of a model."""

    none = "none"
    mup = "mup"


class Wandb(StrEnum):
    """How to log to wandb."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


LOCAL = "local"
"""`track.mlflow`: a store in the run folder."""

DEEPSPEED_BUCKET = 50_000_000
"""Elements per DeepSpeed bucket: a quarter of the model. DeepSpeed's default of 5e8 would reserve 2 GB."""

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
    "text.synonyms",
    "pretrained",
    "weights",
    "allow",
)
"""Keys that may change when a run is resumed: they affect neither batches nor weights. The content of `data.shards`,
`data.mix` and `text.synonyms` must stay the same, see `training.resume`."""


@dataclass
class Widths(Keys):
    """The sizes of a model that grow with its width. The defaults are those of configs/model/tiny.yaml."""

    section = "optim.base_widths."

    hidden_size: int = ranged(128, least=1)
    """Width of encoder and decoder at which optim.lr was chosen (with optim.transfer=mup)."""
    mlp_dim: int = ranged(512, least=1)
    """Hidden width of the encoder's MLPs in that model."""
    num_heads: int = ranged(4, least=1)
    """Attention heads of its encoder."""
    decoder_heads: int = ranged(4, least=1)
    """Attention heads of its mask decoder."""
    decoder_mlp_dim: int = ranged(256, least=1)
    """Hidden width of its mask decoder's MLPs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self.section, self.hidden_size, self.num_heads, self.decoder_heads)


@dataclass
class OptimConfig(Keys):
    """AdamW, and its learning rate per step: linear warm-up, then the schedule."""

    section = "optim."

    lr: float = ranged(1e-4, least=0)
    """Peak learning rate."""
    weight_decay: float = ranged(1e-5, least=0)
    """AdamW weight decay."""
    weight_decay_all: bool = True
    """Let all weights decay. false: only those of linear layers and convolutions, not norms, biases and embeddings."""
    betas: list[float] = ranged([0.9, 0.999], least=0, below=1)
    """AdamW decay rates of the moments."""
    warmup_steps: int = ranged(1000, least=0)
    """Length of the linear warm-up (steps)."""
    max_steps: int = ranged(MISSING, least=1)
    """Optimizer steps to train for. The learning rate is 0 here."""
    schedule: Schedule = Schedule.cosine
    """cosine: cosine decay from the end of the warm-up on. wsd: constant after the warm-up, decay at the end (MiniCPM,
    arXiv 2404.06395; Hägele et al. 2024, arXiv 2405.18392), so that shorter runs can branch from a longer one."""
    decay_share: float = ranged(0.2, above=0, most=1)
    """Share of the steps, at the end, in which the learning rate decays (wsd)."""
    decay_shape: DecayShape = DecayShape.sqrt
    """Shape of that decay over the share x of it that is done. sqrt: 1 - sqrt(x). linear: 1 - x. cosine: half a
    cosine wave."""
    ema: float = ranged(0.0, least=0, below=1)
    """Decay per step of an exponential average of the trained weights, such as 0.999. It is in checkpoints, validation
    uses it, and `export` writes it with weights=ema. 0: no average."""
    clip_norm: float = ranged(1.0, least=0)
    """Maximum gradient norm. 0 disables clipping."""
    transfer: Transfer = Transfer.none
    """mup: optim.lr and optim.weight_decay are those of a model of the widths optim.base_widths; initial weights,
    attention and rates of wider or narrower models follow from them (muP), so that one rate serves all widths. Depth is
    not considered. Weights that are loaded keep their values; only the rates apply to them. none: one rate for all."""
    base_widths: Widths = field(default_factory=Widths)
    lora_rank: int = ranged(0, least=0)
    """Rank of the low-rank adapters that train in the place of the image encoder (LoRA, arXiv 2106.09685; only train).
    The encoder itself is frozen. `export`, and every command that reads a checkpoint, adds them to its weights. 0: no
    adapters."""
    lora_alpha: float = ranged(16.0, above=0)
    """What the adapters add is multiplied by lora_alpha / lora_rank."""
    lora_targets: list[str] = field(default_factory=lambda: ["*.attn.*", "*.mlp.*"])
    """Patterns of the linear layers that are adapted, among image_encoder.blocks.N.attn.qkv, attn.out_proj, mlp.linear1
    and mlp.linear2 of each block N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.lora_rank or self.transfer is Transfer.none,
            "optim.lora_rank",
            "adapters have no width that optim.transfer=mup could compare: use transfer=none",
        )
        require(len(self.betas) == 2, "optim.betas", f"needs 2 numbers, got {len(self.betas)}")
        if self.schedule is Schedule.wsd and self.max_steps != MISSING:
            begins = f"the decay begins at step {self.decay_start} of optim.max_steps={self.max_steps}"
            problem = f"{self.warmup_steps} steps are too long: {begins}"
            require(self.warmup_steps <= self.decay_start, "optim.warmup_steps", problem)

    @property
    def decay_start(self) -> int:
        """The step after which the learning rate decays (wsd)."""
        return self.max_steps - max(1, round(self.decay_share * self.max_steps))


@dataclass
class RunConfig(Keys):
    """Where and how to run training."""

    section = "run."

    out: str = MISSING
    """Run folder for checkpoints, metrics.csv, config.yaml and manifest.json."""
    resume: bool = True
    """Resume from the last checkpoint in `out`, if there is one."""
    strategy: Strategy = Strategy.auto
    """auto: one process, or ddp. ddp: full model on each device. fsdp: FSDP2, which shards weights, gradients and
    optimizer state block by block. zero1, zero2, zero3: DeepSpeed, which shards the optimizer state, then also
    gradients, then also weights."""
    custom_strategy: str = ""
    """package.module:function of your own that makes a Lightning strategy from these settings, instead of
    `strategy`."""
    shard_degree: int = ranged(0, least=0)
    """Ranks that share one copy of the weights (fsdp); must divide the number of ranks. 0: all. The GPUs of a node,
    such as 8: weights are gathered within a node, and only gradients are sent between nodes (HSDP)."""
    offload: bool = False
    """Keep the sharded state in main memory (fsdp, zero1 to zero3)."""
    devices: int = ranged(1, least=1)
    """Processes per node: GPUs, or ranks on CPUs."""
    nodes: int = ranged(1, least=1)
    """Nodes of the job."""
    accelerator: str = "auto"
    """cpu, cuda or auto."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, otherwise fp32."""
    tf32: bool = False
    """Let GPUs multiply float32 matrices as TF32 (10-bit mantissa) where bf16 is not used; with precision=fp32 this
    means all of them. The trilinear weights of upsampling are exact in TF32."""
    deterministic: bool = False
    """Use only deterministic operations. This is slower on GPUs. Two runs, and a resumed one, were bit-identical on one
    H200 with one rank. CPUs do not need this key."""
    accumulate: int = ranged(1, least=1)
    """Micro-batches per optimizer step. The global batch does not change."""
    prompts_at_once: int = ranged(0, least=0)
    """Prompts of each volume to decode together, which limits memory. The losses do not change. 0: as many as fit in
    memory on a GPU, 6 on a CPU."""
    recompute: Recompute = Recompute.none
    """Activations of the encoder blocks to recompute in the backward pass to save memory. cheap: all but the results of
    matrix products and attention (not with zero3). blocks: everything inside a block, which takes a third more time."""
    compile: bool = False
    """Compile the encoder blocks and the decoder with torch.compile. The first steps take up to minutes longer, the
    others are faster. A single process on a GPU also records its step as one CUDA graph, and keeps the memory of a
    step between steps. With fsdp only the encoder blocks are compiled. Not with zero3."""
    peak_tflops: float = ranged(0.0, least=0)
    """Peak matrix throughput of one device (TFLOP/s), used to compute MFU. 0: the bf16 value from
    segvol_pl/planning/devices.py; no MFU if the device is not listed."""
    profile: int = ranged(0, least=0)
    """Steps to profile, starting with the sixth. Writes a Chrome trace of rank 0 to the run folder. 0 disables."""
    memory_snapshot: bool = False
    """Record what allocates GPU memory, and write it into the run folder (`memory/`) after the third step and when
    memory runs out; pytorch.org/memory_viz shows the files. Only on GPUs."""
    log_every: int = ranged(10, least=1)
    """Log metrics every N steps."""
    val_every: int = ranged(500, least=0)
    """Validate every N steps. 0: only at the end."""
    val_batches: int = ranged(8, least=0)
    """Batches per validation. 0 disables validation."""
    early_stop: int = ranged(0, least=0)
    """End the run after so many validations in a row whose mean Dice (over prompts and categories) is not above the
    best by more than early_stop_delta (only train). It then counts as complete, and `best.ckpt` is the checkpoint of
    the best Dice instead of the lowest loss. 0: train to optim.max_steps."""
    early_stop_delta: float = ranged(0.0, least=0, below=1)
    """Smallest rise of the mean Dice that early_stop counts."""
    checkpoint_every: int = ranged(500, least=1)
    """Write a checkpoint to resume from every N steps. Each replaces the previous one."""
    checkpoint_minutes: float = ranged(0.0, least=0)
    """Also write that checkpoint after this time (minutes, on rank 0's clock). 0: only by steps."""
    checkpoint_format: CheckpointFormat = CheckpointFormat.full
    """full: gathered on rank 0, which writes one file. sharded: every rank writes its part at the same time; a
    checkpoint is then a folder of the same name. Each resumes under every strategy and number of ranks. Worth it for
    models of several GB with fsdp."""
    save_every: int = ranged(0, least=0)
    """Also keep a checkpoint every N steps; 0 disables."""
    keep_last: int = ranged(3, least=1)
    """How many of the newest `save_every` checkpoints to keep."""
    keep_steps: list[int] = ranged([], least=1)
    """Also keep a checkpoint of each of these steps, for good. Other runs can branch from them."""
    branch_from: str | None = None
    """Checkpoint of another run, `step-N.ckpt`, to continue from in `out`, with another length: optim.max_steps and the
    decay of the schedule wsd. Everything else must be as in that run. The result is that of a run of this length from
    the start. Not used once `out` holds a checkpoint of its own."""
    max_bad_steps: int = ranged(0, least=0)
    """Consecutive steps with NaN or infinite loss or gradients to skip. One more aborts the run."""
    cpu_threads: int = ranged(0, least=0)
    """CPU threads of the math library. 0: its own default."""
    requeue: bool = True
    """Requeue the SLURM job when it receives SIGUSR1 or SIGTERM, and after a hang or a crash unless another start would
    end alike."""
    rehearse: int = ranged(0, least=0)
    """Instead of training, rehearse the start of a run of so many ranks on this machine, in seconds and without GPUs:
    batches, the samples of each rank, split weights, room for checkpoints. What the start would refuse is refused.
    0: train."""
    hang_timeout: float = ranged(1800.0, above=0, most=10**9)
    """Abort and name the stalled rank after this long without progress (s). Must exceed the time of compiling the first
    steps and of saving a checkpoint, in the background too."""
    straggler_intervals: int = ranged(3, least=0)
    """Name a rank as slow if its own rate is below 0.8 of the ranks' median in this many log intervals in a row. 0: do
    not compare the ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.strategy is not Strategy.zero1 or self.accumulate == 1,
            "run.accumulate",
            "must be 1 with zero1, which gives wrong gradients for micro-batches: use zero2",
        )
        check_custom("run.custom_strategy", [self.custom_strategy] if self.custom_strategy else [])
        alone = self.strategy is Strategy.auto or not self.custom_strategy
        require(alone, "run.custom_strategy", f"replaces run.strategy={self.strategy.value}: give only one of them")
        ours = self.checkpoint_format is CheckpointFormat.full or not self.custom_strategy
        require(ours, "run.checkpoint_format", "sharded does not work with run.custom_strategy: use full")
        kept = self.recompute is not Recompute.cheap or self.strategy is not Strategy.zero3
        require(kept, "run.recompute", "cheap would give wrong gradients with zero3: use blocks")
        # DeepSpeed gathers weights by hooks within the blocks.
        hooked = self.strategy is Strategy.zero3
        require(not (hooked and self.compile), "run.compile", "does not work with zero3: use fsdp, ddp, zero1 or zero2")
        splits = self.strategy not in (Strategy.auto, Strategy.ddp)
        require(splits or not self.offload, "run.offload", "needs a strategy that shards: fsdp, zero1, zero2 or zero3")
        validates = self.val_every > 0 and self.val_batches > 0
        require(validates or not self.early_stop, "run.early_stop", "needs run.val_every and run.val_batches above 0")
        self._check_degree()

    def _check_degree(self) -> None:
        degree, ranks = self.shard_degree, self.devices * self.nodes
        split = self.strategy is Strategy.fsdp
        require(split or not degree, "run.shard_degree", "needs run.strategy=fsdp")
        divides = not degree or ranks % degree == 0
        within = f"run.devices={self.devices} x run.nodes={self.nodes}"
        require(divides, "run.shard_degree", f"{degree} does not divide the {ranks} ranks ({within})")


@dataclass
class TrackConfig(Keys):
    """Experiment tracking. metrics.csv is always written."""

    section = "track."

    wandb: Wandb = Wandb.auto
    """auto: online if an API key is found, otherwise offline."""
    mlflow: str | None = None
    """Log to MLflow too: `local`, a store in the run folder, or an address, as http://HOST:5000. Its user and password
    belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    tensorboard: bool = False
    """Write event files for TensorBoard too, in the run folder."""
    project: str = "segvol_pl"
    """wandb project, and MLflow experiment."""
    name: str | None = None
    """Name of the run there. null: the name of the run folder."""
    group: str | None = None
    """wandb group; at MLflow the tag `group`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.mlflow is None or self.mlflow == LOCAL or re.match(r"[a-z][a-z+.-]*:", self.mlflow) is not None
        require(known, "track.mlflow", f"{self.mlflow!r} is neither {LOCAL} nor an address with a scheme")


@dataclass
class RunsConfig(Keys):
    """List training runs: state, step, rate, best Dice, goodput, and the keys in which their configurations differ."""

    folders: list[str] = MISSING
    """Run folders, and folders of run folders. DIR ... on the command line."""
    out: str | None = None
    """Write the table to this file, as CSV (.csv) or as a page (.html). null: print it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = self.out is None or self.out.endswith((".csv", ".html"))
        require(ends, "out", f"{self.out!r} must end in .csv or .html")


def check_shares(data: DataConfig, run: RunConfig) -> None:
    """Raise ConfigError unless every micro-batch can take as many samples from each share of the corpus."""
    fits = data.global_batch % (data.locality * run.accumulate) == 0 or data.locality == 1
    given = f"data.global_batch={data.global_batch} must be a multiple of it x run.accumulate={run.accumulate}"
    require(fits, "data.locality", f"{data.locality} shares are not possible: {given}")


def check_steps(optim: OptimConfig, run: RunConfig) -> None:
    """Raise ConfigError for a step to keep that the run does not pass, and for a branch without the schedule wsd."""
    passed = optim.max_steps == MISSING or max(run.keep_steps, default=0) < optim.max_steps
    problem = f"{max(run.keep_steps, default=0)} is not below optim.max_steps={optim.max_steps}"
    require(passed, "run.keep_steps", problem)
    branches = run.branch_from is None or optim.schedule is Schedule.wsd
    require(branches, "run.branch_from", f"needs optim.schedule=wsd, this is {optim.schedule.value}")


@dataclass
class PretrainConfig(Keys):
    """Pre-train the image encoder with SimMIM (paper Eq. 1)."""

    model: SegVolConfig = field(default_factory=SegVolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    mask_ratio: float = ranged(0.6, above=0, below=1)
    """Fraction of tokens hidden from the encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.optim.lora_rank, "optim.lora_rank", "pre-training trains the encoder itself: leave it out")
        require(not self.run.early_stop, "run.early_stop", "pre-training has no Dice: leave it out")
        check_shares(self.data, self.run)
        check_steps(self.optim, self.run)


@dataclass
class TrainConfig(Keys):
    """Train the model on prompts and pseudo-labels (paper Algorithm 1)."""

    model: SegVolConfig = field(default_factory=SegVolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    pretrained: str | None = None
    """Checkpoint to take the image encoder from: of a pre-training run, or the released ViT."""
    weights: str | None = None
    """Full model to start from (fine-tuning): a checkpoint, an exported or imported model, one on the hub
    (hub:OWNER/NAME), or a released file."""
    allow: list[str] = field(default_factory=list)
    """Patterns of tensor names that may be missing from `weights`, unknown, or of a different shape. The model keeps
    its own values for them."""
    keep_categories: bool = False
    """Also keep the categories of `weights` that the data lack in the text bank, so that the model still answers to
    their names."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of tensor names to freeze, such as `image_encoder.*`. Frozen tensors need no memory for gradients and
    optimizer state."""
    pseudo_weight: float = ranged(0.1, least=0)
    """Weight of the pseudo-label loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.data, self.run)
        check_steps(self.optim, self.run)
        require(
            self.pretrained is None or self.weights is None,
            "pretrained",
            "weights=FILE already contains an image encoder: give one of them",
        )
        for pattern in self.optim.lora_targets if self.optim.lora_rank else ():
            linears = self.model.encoder_linears
            matches = any(fnmatchcase(name, pattern) for name in linears)
            require(matches, "optim.lora_targets", f"{pattern!r} matches none of {', '.join([*linears][:4])}, ...")
        require(
            not self.optim.lora_rank or bool(self.optim.lora_targets), "optim.lora_targets", "names no layer to adapt"
        )
        require(
            self.weights is not None or not self.keep_categories,
            "keep_categories",
            "needs weights=FILE, whose categories it keeps",
        )
        require(
            self.model.mask_prompt or not self.prompts.mask_fraction,
            "prompts.mask_fraction",
            "needs model.mask_prompt=true",
        )
        whole = all(size % FINER == 0 for size in self.model.patch_size)
        require(
            (self.model.mask_prompt and whole) or not self.prompts.corrections,
            "prompts.corrections",
            f"needs model.mask_prompt=true, and model.patch_size of multiples of {FINER}",
        )
        for name in landmarks_in(self.prompts.combinations):
            require(
                name in self.model.landmark_counts,
                "prompts.combinations",
                f"{name!r} is not among model.landmarks: add {'' if name in SHIPPED_LANDMARKS else 'N*'}{name}",
            )

    @property
    def adapted(self) -> list[str]:
        """Names of the linear layers that have adapters; none without `optim.lora_rank`."""
        targets = self.optim.lora_targets if self.optim.lora_rank else []
        return [name for name in self.model.encoder_linears if any(fnmatchcase(name, each) for each in targets)]
