"""Which samples training reads, and how prompts are drawn from their masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import CUSTOM, HIGHEST_SEED, MISSING, Keys, ranged, require


class LastBatch(StrEnum):
    """What becomes of an epoch's last incomplete global batch."""

    drop = "drop"
    repeat = "repeat"


class StartMethod(StrEnum):
    """How loader processes start."""

    auto = "auto"
    fork = "fork"
    spawn = "spawn"
    forkserver = "forkserver"


COMBINATIONS = ("points+text", "box+text", "text", "box", "points", "box+points")
"""The six prompt combinations of the paper's Algorithm 1, in the published order."""

PARTS = ("text", "points", "box")
"""What a combination is put together from, beside landmarks of the user's own."""


def check_combinations(key: str, names: Sequence[str]) -> None:
    require(len(names) > 0, key, "needs at least one")
    for name in names:
        parts, own = named_parts(name), landmarks_in([name])
        marked = len(set(parts)) == len(parts) and all(CUSTOM.fullmatch(part) for part in own)
        fits = marked if own else name in COMBINATIONS
        require(fits, key, f"{name!r} is none of {', '.join(COMBINATIONS)}, nor has it marks of model.landmarks")


def named_parts(combination: str) -> list[str]:
    """`box+text` -> box, text."""
    return combination.split("+")


def landmarks_in(combinations: Sequence[str]) -> list[str]:
    """The user's own kinds of prompts in them, in the order of the first of each."""
    return list(dict.fromkeys(part for name in combinations for part in named_parts(name) if part not in PARTS))


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
        check_combinations("prompts.combinations", self.combinations)
