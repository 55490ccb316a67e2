"""The schema of `export`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from segvol_pl.config.fields import MISSING, Keys, require


class ExportFormat(StrEnum):
    """What an export is written as."""

    auto = "auto"
    safetensors = "safetensors"
    onnx = "onnx"
    monai = "monai"


class ExportWeights(StrEnum):
    """Which weights of a checkpoint are exported."""

    trained = "trained"
    ema = "ema"


@dataclass
class ExportConfig(Keys):
    """Write a model for others: a .safetensors, a .pth for the published code, or a folder in the format of another
    program."""

    source: str = MISSING
    """Checkpoint (.ckpt), exported model (.safetensors), or hub:OWNER/NAME. SRC on the command line."""
    out: str = MISSING
    """File to write (.safetensors, or .pth for the published code), or a new folder. DST on the command line."""
    published: str | None = None
    """Released weights, or their import: a .pth gets CLIP's text tower and the parts that never run from them.
    PUBLISHED on the command line."""
    weights: ExportWeights = ExportWeights.trained
    """ema: the averaged weights of a checkpoint of a run with optim.ema."""
    format: ExportFormat = ExportFormat.auto
    """auto: the file that out names, or for a folder as safetensors. safetensors: a folder with model.safetensors.
    onnx: encoder and decoder for programs without torch (needs the extra `onnx`). monai: a MONAI bundle."""
    card: bool = False
    """Also write README.md, a model card: data, prompts, figures per category, compute, limits. Needs evaluation and
    license, and a folder."""
    evaluation: str | None = None
    """Folder of `segvol-pl evaluate` with this very file as its checkpoint, for the card."""
    license: str | None = None
    """License of the weights, for the card, as hubs name it: apache-2.0, cc-by-nc-4.0, other."""
    hub: str | None = None
    """Repository of the Hugging Face hub, OWNER/NAME, to which the folder is uploaded. It is made if it is not there.
    The token is read from HF_TOKEN."""
    private: bool = True
    """Whether a repository that is made is private."""

    def __post_init__(self) -> None:
        super().__post_init__()
        file = self.out.endswith(FILES)
        require(not file or self.format is ExportFormat.auto, "format", f"{self.format} is a folder, {self.out} a file")
        require(not (self.card and file), "card", f"needs a folder, {self.out} is a file")
        for key in ("evaluation", "license"):
            given = getattr(self, key) is not None
            require(given or not self.card, "card", f"needs {key}=, see --help")
            require(self.card or not given, key, "is for a card: add card=true")
        ema = self.weights is ExportWeights.ema
        remedy = "export them to a .safetensors first, and evaluate and export that"
        require(not (self.card and ema), "card", f"the averaged weights were not evaluated: {remedy}")
        require(self.hub is None or not file, "hub", f"uploads a folder, {self.out} is a file")
        named = self.hub is None or re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub) is not None
        require(named, "hub", f"{self.hub!r} is not OWNER/NAME")
        require(self.published is None or file, "published", "is for a file (.safetensors or .pth)")


FILES = (".safetensors", ".pth")
"""Endings of exports that are a single file."""
