"""The configuration of every command: its schema. `segvol_pl.config.loader` fills it from files and `key=value`.

1. A command's schema is a dataclass below; the docstring under each field is its help.
2. `MISSING` marks a key that has no default and must be given.
3. A number's range stands at its field, as `ranged(default, least=1)`. `__post_init__` checks lengths, and keys against
   each other.
4. Loading checks names and types; building checks the rest.

Imports neither torch nor lightning: a wrong key must fail at once.
"""

from __future__ import annotations

from segvol_pl.config.data import (
    COMBINATIONS,
    PARTS,
    DataConfig,
    LastBatch,
    PromptConfig,
    StartMethod,
    landmarks_in,
    named_parts,
)
from segvol_pl.config.evaluation import (
    BOX_SOURCES,
    CasesConfig,
    DrawConfig,
    EvaluateConfig,
    Mode,
    Slice,
    Timing,
    points_drawn,
)
from segvol_pl.config.experiments import CompareConfig, DataCount, DemoConfig, FitConfig, MetricPick, PointsConfig
from segvol_pl.config.fields import CUSTOM, HIGHEST_SEED, MISSING, Keys, Range, ranged
from segvol_pl.config.inference import (
    EVERY_CATEGORY,
    Blend,
    Coordinates,
    Overlaps,
    PredictConfig,
    SlidingConfig,
    ViewConfig,
    ZoomConfig,
)
from segvol_pl.config.model import (
    LANDMARKS,
    MASK_TOKENS,
    Convention,
    ImportConfig,
    Precision,
    SegVolConfig,
    TextConfig,
    TextSource,
)
from segvol_pl.config.packing import InventoryConfig, PackConfig, RegionsConfig, parse_part
from segvol_pl.config.training import (
    DEEPSPEED_BUCKET,
    MAY_CHANGE,
    OptimConfig,
    PretrainConfig,
    Recompute,
    RunConfig,
    Strategy,
    TrackConfig,
    TrainConfig,
    Wandb,
)

__all__ = [
    "BOX_SOURCES",
    "BUNDLED",
    "COMBINATIONS",
    "CUSTOM",
    "DEEPSPEED_BUCKET",
    "EVERY_CATEGORY",
    "HIGHEST_SEED",
    "LANDMARKS",
    "MASK_TOKENS",
    "MAY_CHANGE",
    "MISSING",
    "PARTS",
    "SCHEMAS",
    "Blend",
    "CasesConfig",
    "CompareConfig",
    "Convention",
    "Coordinates",
    "DataConfig",
    "DataCount",
    "DemoConfig",
    "DrawConfig",
    "EvaluateConfig",
    "FitConfig",
    "ImportConfig",
    "InventoryConfig",
    "Keys",
    "LastBatch",
    "MetricPick",
    "Mode",
    "OptimConfig",
    "Overlaps",
    "PackConfig",
    "PointsConfig",
    "Precision",
    "PredictConfig",
    "PretrainConfig",
    "PromptConfig",
    "Range",
    "Recompute",
    "RegionsConfig",
    "RunConfig",
    "SegVolConfig",
    "Slice",
    "SlidingConfig",
    "StartMethod",
    "Strategy",
    "TextConfig",
    "TextSource",
    "Timing",
    "TrackConfig",
    "TrainConfig",
    "ViewConfig",
    "Wandb",
    "ZoomConfig",
    "landmarks_in",
    "named_parts",
    "parse_part",
    "points_drawn",
    "ranged",
]

BUNDLED = ("configs", "slurm", "shards/datasets")
"""Folders of the repository that a wheel carries too, and that `segvol-pl init DIR` lays out."""


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
