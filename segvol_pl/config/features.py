"""The schemas of frozen features: computing them, and probing what they are worth."""

from __future__ import annotations

from dataclasses import dataclass, field

from segvol_pl.config.fields import HIGHEST_SEED, MISSING, Keys, ranged, require
from segvol_pl.config.model import Precision


@dataclass
class EmbedConfig(Keys):
    """Compute the frozen features of a checkpoint's image encoder over shards. Resumes if interrupted."""

    checkpoint: str = MISSING
    """Checkpoint of pretrain or train (.ckpt), exported model (.safetensors or hub:OWNER/NAME), or released weights."""
    shards: str = MISSING
    """Folder of packed shards (with index.json), or its URL."""
    split: str = "all"
    """Split of the shards to embed, or `all` for every sample."""
    out: str = MISSING
    """Folder for parts/, volumes.csv and index.json."""
    tokens: bool = False
    """Also write the features of every token, as float16: tokens_NTE of each part."""
    untrained: bool = True
    """Also write the features of an encoder of the same architecture with random weights. `probe` compares those of the
    checkpoint with them. Doubles the computation."""
    volumes_per_part: int = ranged(64, least=1)
    """Volumes of one file in parts/, which a rank computes at a time. An interruption loses at most one such part."""
    batch: int = ranged(4, least=1)
    """Volumes that the encoder takes at once."""
    max_bad_fraction: float = ranged(0.0, least=0, most=1)
    """Fraction of volumes that may be unreadable. They are listed in index.json; above this fraction the command
    fails."""
    rank_timeout: float = ranged(3600.0, above=0)
    """How long rank 0 waits for the next part of another rank (s) before aborting."""
    device: str = "auto"
    """auto, cuda, cuda:1 or cpu. With auto and cuda, each rank of a node takes its own GPU."""
    precision: Precision = Precision.auto
    """auto: bf16 autocast on GPUs that support it and on CPUs with AMX, otherwise fp32."""


@dataclass
class ProbeConfig(Keys):
    """Measure what frozen features are worth without fine-tuning: nearest neighbours and linear probes, by the number
    of labels."""

    features: str = MISSING
    """Folder that `embed` wrote."""
    labels: str | None = None
    """CSV file with the columns key and label, and optionally group: volumes of one group, such as a patient, are never
    both trained and tested on. null: the categories that each labelled volume holds."""
    categories: list[str] = field(default_factory=list)
    """Without labels: categories whose presence to predict. Empty: every category that enough volumes have and lack."""
    out: str = MISSING
    """Folder for probe.json, probe.csv, figures and index.html."""
    folds: int = ranged(5, least=0)
    """Folds of the cross-validation. 0: train on the shards' split `train`, and test on the other volumes."""
    fractions: list[float] = ranged([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], above=0, most=1)
    """Fractions of the labels to train with. Smaller ones are parts of larger ones."""
    draws: int = ranged(5, least=1)
    """How often the labels of a fraction below 1 are drawn."""
    neighbours: int = ranged(5, least=1)
    """Nearest neighbours that vote, by cosine similarity."""
    bootstraps: int = ranged(1000, least=100)
    """Bootstrap samples per interval. A 95 % interval needs at least 100."""
    seed: int = ranged(0, least=0, most=HIGHEST_SEED)
    """Seed for the folds, the drawn labels and the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.folds != 1, "folds", "must be 0 or at least 2")
        require(1.0 in self.fractions, "fractions", "must hold 1.0, all labels")
        require(not (self.labels and self.categories), "categories", "excludes labels: give one of them")
