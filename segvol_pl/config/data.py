"""The schemas of data and prompts: which samples to read, and how to draw crops and prompts from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import CUSTOM, HIGHEST_SEED, MISSING, Keys, ranged, require
from segvol_pl.config.model import SHIPPED_LANDMARKS


class LastBatch(StrEnum):
    """What to do with the last incomplete global batch of an epoch."""

    drop = "drop"
    repeat = "repeat"


class StartMethod(StrEnum):
    """How to start loader processes."""

    auto = "auto"
    fork = "fork"
    spawn = "spawn"
    forkserver = "forkserver"


class Balance(StrEnum):
    """How the frequency of a category enters its chance to be drawn."""

    none = "none"
    sqrt = "sqrt"
    inverse = "inverse"


COMBINATIONS = ("points+text", "box+text", "text", "box", "points", "box+points")
"""The six prompt combinations of the paper's Algorithm 1, in the published order."""

PARTS = ("text", "points", "box")
"""Parts of a combination, in addition to shipped and custom landmarks."""


def check_combinations(key: str, names: Sequence[str]) -> None:
    """Raise ConfigError unless every name is a known combination, or combines custom landmarks."""
    require(len(names) > 0, key, "needs at least one")
    for name in names:
        parts, own = named_parts(name), landmarks_in([name])
        marked = len(set(parts)) == len(parts) and all(
            part in SHIPPED_LANDMARKS or CUSTOM.fullmatch(part) for part in own
        )
        fits = marked if own else name in COMBINATIONS
        require(fits, key, f"{name!r} is none of {', '.join(COMBINATIONS)}, and does not combine model.landmarks")


def named_parts(combination: str) -> list[str]:
    """Split a combination into its parts: `box+text` -> box, text."""
    return combination.split("+")


def landmarks_in(combinations: Sequence[str]) -> list[str]:
    """List the landmarks, shipped and custom, in some combinations, without repetition, in order."""
    return list(dict.fromkeys(part for name in combinations for part in named_parts(name) if part not in PARTS))


@dataclass
class DataConfig(Keys):
    """Which samples to read, and how to draw crops from them."""

    section = "data."

    shards: str = MISSING
    """Folder of packed shards (with index.json), its URL (http, https, s3, gs), or `pipe:COMMAND {file}`: a command
    that prints one of the files. A pipe is read front to back and gives weaker guarantees."""
    mix: list[str] = field(default_factory=list)
    """Additional folders, each as `DIR` or `WEIGHT*DIR`. WEIGHT is how often each of their samples occurs per epoch
    (default 1)."""
    fraction: float = ranged(1.0, above=0, most=1)
    """Fraction of each folder's samples to train on, chosen by content hash. Smaller fractions are subsets of larger
    ones."""
    split: str = "train"
    """Split used for training."""
    val_split: str = "test"
    """Split used for validation."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the order of samples and for all random choices within a sample."""
    global_batch: int = ranged(32, least=1)
    """Volumes per optimizer step, over all ranks and accumulation steps."""
    last_batch: LastBatch = LastBatch.drop
    """Last incomplete global batch of an epoch. drop: skip it. repeat: fill it up with samples from the start of the
    epoch."""
    locality: int = ranged(1, least=1)
    """Shares to divide the corpus into, so that each node reads the same share for several epochs and `cache` holds it.
    Set it to the number of nodes, or to a multiple or divisor of it. It must divide global_batch / run.accumulate; then
    batches are the same on any number of ranks. 1: every node reads from the complete corpus."""
    locality_epochs: int = ranged(4, least=1)
    """Epochs after which the corpus is divided into other shares. Unused with locality=1."""
    workers: int = ranged(4, least=0)
    """Loader processes per rank. 0 loads in the training process."""
    start_method: StartMethod = StartMethod.auto
    """How to start loader processes. All methods give the same batches; fork starts fastest. auto: fork on CPUs,
    forkserver on GPUs, where a forked copy of the training process can deadlock on the threads of CUDA and NCCL."""
    prefetch: int = ranged(2, least=1)
    """Batches that each loader process prepares ahead."""
    samples_per_volume: int = ranged(1, least=1)
    """Samples drawn from each volume per epoch, each with different random choices."""
    overview_fraction: float = ranged(0.5, least=0, most=1)
    """Fraction of samples that show the full volume. The others are crops at native resolution."""
    grid_fraction: float = ranged(0.0, least=0, most=1)
    """Fraction of crops that lie on the grid of zoom-in windows. The others lie around a voxel of a category. Both hold
    such a voxel."""
    max_bad_fraction: float = ranged(0.001, least=0, most=1)
    """Fraction of the corpus that may be damaged. Damaged samples are replaced by others; above this fraction the run
    aborts."""
    retry_seconds: float = ranged(60.0, least=0)
    """How long to retry an unresponsive folder or remote store (s) before aborting."""
    cache: str = ""
    """Folder on the node's local disk that caches what is read from URLs. All processes of a node share it. Empty: no
    cache."""
    cache_gb: float = ranged(100.0, above=0)
    """Maximum size of the cache (GB). The least recently used files are deleted first."""
    pipe_buffer: int = ranged(16, least=1)
    """Volumes that each loader process of a pipe: source buffers for shuffling."""
    flip: float = ranged(0.2, least=0, most=1)
    """Probability of flipping each axis."""
    intensity: float = ranged(0.1, least=0, most=1)
    """Probability of scaling the intensities, and of shifting them, each by up to 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        piped = self.locality > 1 and self.shards.startswith("pipe:")
        require(not piped, "data.locality", "must be 1 with a pipe: source, which is read in its own order")


@dataclass
class PromptConfig(Keys):
    """How to draw prompts from masks (paper Sec. 2.2, Algorithm 1)."""

    section = "prompts."

    combinations: list[str] = field(default_factory=lambda: list(COMBINATIONS))
    """Prompt combinations to train for every category."""
    categories_per_volume: int = ranged(4, least=1)
    """Categories drawn from each volume per step."""
    balance: Balance = Balance.none
    """Chance of a category, among those of a volume, to be the centre of a window and to be drawn first. none: the same
    for all. inverse: as 1 / the number of training volumes that hold it. sqrt: as 1 / the root of that."""
    per_category: int = ranged(0, least=0)
    """Combinations drawn for each of these categories, without repetition. The loss estimates that over all of them.
    0: all combinations."""
    absent_fraction: float = ranged(0.0, least=0, most=1)
    """Fraction of these categories that are drawn from those that the crop does not show, prompted by text, to be
    segmented as nothing. Needs prompts.per_category."""
    absent: float = ranged(0.0, least=0, most=1)
    """Fraction of these categories that are drawn from those that the complete volume lacks although its folder of
    shards labels them in others, prompted by text, to be segmented as nothing. For folders that label all their
    categories in every volume. Needs prompts.per_category."""
    mask_fraction: float = ranged(0.0, least=0, most=1)
    """Fraction of the categories in crops whose prompts come with a simulated coarse mask. Needs model.mask_prompt."""
    corrections: int = ranged(0, least=0)
    """Times that each category is asked again, each time with one more click on what the last answer got wrong, and
    with that answer as its mask. Needs model.mask_prompt. Not in the paper."""
    pseudo_per_volume: int = ranged(6, least=0)
    """Pseudo-label prompts drawn from each volume per step: even ones are points, odd ones boxes. 0 disables."""
    extra_positive: int = ranged(10, least=0)
    """Maximum number of points inside a mask in addition to the first."""
    extra_negative: int = ranged(10, least=0)
    """Maximum number of points outside a mask."""
    box_jitter: float = ranged(0.0, least=0, below=0.5)
    """Maximum shift of each box face, as a fraction of the box's extent. The paper jitters boxes, its code does not."""
    slice_boxes: float = ranged(0.0, least=0, most=1)
    """Fraction of the categories whose box is that of their middle slice, as deep as the category: smaller than the
    category where this is wider elsewhere. So do users draw boxes, and the CVPR 2025 challenge. Not in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_combinations("prompts.combinations", self.combinations)
        most = len(self.combinations)
        require(self.per_category <= most, "prompts.per_category", f"there are only {most} prompts.combinations")
        for key in (key for key in ("absent_fraction", "absent") if getattr(self, key)):
            require(self.per_category > 0, f"prompts.{key}", "set prompts.per_category")
            require("text" in self.combinations, f"prompts.{key}", "needs text among prompts.combinations")

    @property
    def per_volume(self) -> int:
        """Prompts that are decoded from one volume in a step."""
        drawn = self.per_category or len(self.combinations)
        return self.categories_per_volume * (drawn + self.corrections) + self.pseudo_per_volume
