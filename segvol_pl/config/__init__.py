"""The configuration of every command: `SCHEMAS` names its schema, `segvol_pl.config.loader` loads it.

1. A schema is a dataclass in the module of its room; the docstring under each field is the help for that key.
2. `MISSING` marks a key that has no default and must be given.
3. The range of a number is declared at its field: `ranged(default, least=1)`. `__post_init__` checks lengths, and keys
   against each other.
4. Loading checks names and types; creating the dataclass checks the rest.

This package imports neither torch nor lightning, so that a wrong key fails at once.
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
    EvaluationProtocol,
    Mode,
    Slice,
    Timing,
    points_drawn,
)
from segvol_pl.config.experiments import (
    CompareConfig,
    DataCount,
    DemoConfig,
    FitConfig,
    MetricPick,
    PaperConfig,
    PointsConfig,
)
from segvol_pl.config.fields import CUSTOM, HIGHEST_SEED, MISSING, Keys, Range, ranged
from segvol_pl.config.inference import (
    EVERY_CATEGORY,
    Blend,
    ChallengePredictConfig,
    Coordinates,
    Overlaps,
    PredictConfig,
    ServeConfig,
    SlidingConfig,
    ViewConfig,
    ZoomConfig,
    names_axes,
)
from segvol_pl.config.model import (
    FINER,
    LANDMARKS,
    LINE,
    MASK_TOKENS,
    SHIPPED_LANDMARKS,
    Convention,
    ImportConfig,
    Precision,
    SegVolConfig,
    TextConfig,
    TextSource,
)
from segvol_pl.config.packing import (
    InventoryConfig,
    PackConfig,
    PhantomsConfig,
    RegionsConfig,
    RepackConfig,
    parse_part,
)
from segvol_pl.config.training import (
    DEEPSPEED_BUCKET,
    MAY_CHANGE,
    CheckpointFormat,
    DecayShape,
    OptimConfig,
    PretrainConfig,
    Recompute,
    RunConfig,
    Schedule,
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
    "FINER",
    "HIGHEST_SEED",
    "LANDMARKS",
    "LINE",
    "MASK_TOKENS",
    "MAY_CHANGE",
    "MISSING",
    "PARTS",
    "SCHEMAS",
    "SHIPPED_LANDMARKS",
    "Blend",
    "CasesConfig",
    "ChallengePredictConfig",
    "CheckpointFormat",
    "CompareConfig",
    "Convention",
    "Coordinates",
    "DataConfig",
    "DataCount",
    "DecayShape",
    "DemoConfig",
    "DrawConfig",
    "EvaluateConfig",
    "EvaluationProtocol",
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
    "PaperConfig",
    "PhantomsConfig",
    "PointsConfig",
    "Precision",
    "PredictConfig",
    "PretrainConfig",
    "PromptConfig",
    "Range",
    "Recompute",
    "RegionsConfig",
    "RepackConfig",
    "RunConfig",
    "Schedule",
    "SegVolConfig",
    "ServeConfig",
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
    "names_axes",
    "parse_part",
    "points_drawn",
    "ranged",
]

BUNDLED = ("configs", "slurm", "shards/datasets")
"""Folders of the repository that are also in the wheel, and that `segvol-pl init DIR` copies."""


SCHEMAS: dict[str, type] = {
    "demo": DemoConfig,
    "phantoms": PhantomsConfig,
    "inventory": InventoryConfig,
    "pack": PackConfig,
    "repack": RepackConfig,
    "pretrain": PretrainConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "view": ViewConfig,
    "challenge predict": ChallengePredictConfig,
    "serve": ServeConfig,
    "import": ImportConfig,
    "scaling fit": FitConfig,
    "scaling compare": CompareConfig,
    "paper": PaperConfig,
}
