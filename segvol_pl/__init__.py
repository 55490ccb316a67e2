"""SegVol, universal and interactive volumetric CT segmentation, in PyTorch Lightning.

`Predictor` and `Prompt` are imported at first use, so that `import segvol_pl` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segvol_pl.imaging.prompts import Prompt
    from segvol_pl.inference.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "Prompt", "__version__"]

_HOMES = {"Predictor": "segvol_pl.inference.predictor", "Prompt": "segvol_pl.imaging.prompts"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
