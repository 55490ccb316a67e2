"""The schema of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from segvol_pl.config.fields import MISSING, Keys, require


class ExportFormat(StrEnum):
    """What an export is written as."""

    auto = "auto"
    safetensors = "safetensors"
    onnx = "onnx"


class ExportWeights(StrEnum):
    """Which weights of a checkpoint are exported."""

    trained = "trained"
    ema = "ema"


@dataclass
class ExportConfig(Keys):
    """Write a model for others: a .safetensors, a .pth for the published code, or a folder in the format of another
    program."""

    source: str = MISSING
    """Checkpoint (.ckpt) or exported model (.safetensors). SRC on the command line."""
    out: str = MISSING
    """File to write (.safetensors, or .pth for the published code), or a new folder. DST on the command line."""
    published: str | None = None
    """Released weights, or their import: a .pth gets CLIP's text tower and the parts that never run from them.
    PUBLISHED on the command line."""
    weights: ExportWeights = ExportWeights.trained
    """ema: the averaged weights of a checkpoint of a run with optim.ema."""
    format: ExportFormat = ExportFormat.auto
    """auto: the file that out names, or for a folder as safetensors. safetensors: a folder with model.safetensors.
    onnx: encoder and decoder for programs without torch (needs the extra `onnx`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        file = self.out.endswith(FILES)
        require(not file or self.format is ExportFormat.auto, "format", f"{self.format} is a folder, {self.out} a file")
        require(self.published is None or file, "published", "is for a file (.safetensors or .pth)")


FILES = (".safetensors", ".pth")
"""Endings of exports that are a single file."""
