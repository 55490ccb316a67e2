"""Text: category names become vectors once, before training; the model only holds the table and a projection.

No training process loads CLIP: `TextBank.from_clip` runs its text tower once per name, and the bank travels in
the checkpoint. Where CLIP cannot be had, `TextBank.seeded` gives each name a fixed random vector: names are then
told apart, but their meaning is not known.
"""

from __future__ import annotations

import difflib
import logging
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from segvol_pl.config import SegVolConfig, TextConfig, TextSource

log = logging.getLogger(__name__)


class UnknownCategory(ValueError):
    """A name that the text bank does not hold. The message offers the nearest ones."""


class TextError(ValueError):
    """A text tower that cannot be loaded."""


class TextBank:
    """Category names and their vectors_KE (float32, K names)."""

    def __init__(self, names: Sequence[str], vectors_KE: Tensor) -> None:
        self.names = list(names)
        self.vectors_KE = vectors_KE
        self._rows = {name: row for row, name in enumerate(self.names)}

    def index(self, name: str) -> int:
        """Raises UnknownCategory with the nearest names."""
        if name not in self._rows:
            near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.5) or self.names[:5]
            raise UnknownCategory(
                f"category {name!r} is not in the text bank of this model; nearest: {', '.join(near)}"
            )
        return self._rows[name]

    @classmethod
    def build(cls, names: Sequence[str], config: TextConfig, dim: int) -> TextBank:
        """The bank that `config` asks for. Raises TextError where CLIP cannot be loaded or has another width."""
        if config.source is TextSource.seeded:
            log.warning("text bank: fixed random vectors seeded by the category names, not CLIP (text.source=seeded)")
            return cls.seeded(names, dim)
        bank = cls.from_clip(names, config)
        if bank.vectors_KE.shape[1] != dim:
            raise TextError(
                f"text.clip: {config.clip} gives {bank.vectors_KE.shape[1]} numbers, model.text_dim is {dim}"
            )
        return bank

    @classmethod
    def seeded(cls, names: Sequence[str], dim: int) -> TextBank:
        rows = [np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(dim) for name in names]
        return cls(names, torch.tensor(np.stack(rows), dtype=torch.float32))

    @classmethod
    def from_clip(cls, names: Sequence[str], config: TextConfig) -> TextBank:
        """CLIP's pooled text output of the template around each name (paper Sec. 2.1)."""
        from transformers import AutoTokenizer, CLIPTextModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(config.clip)
            tower = CLIPTextModel.from_pretrained(config.clip).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise TextError(
                f"text.clip: cannot load {config.clip} ({reason}); give a local folder, or text.source=seeded"
            ) from error
        tokens = tokenizer([config.template.format(name) for name in names], padding=True, return_tensors="pt")
        with torch.inference_mode():
            vectors_KE = tower(**tokens).pooler_output
        return cls(names, vectors_KE.float().clone())


class TextEncoder(nn.Module):
    """Rows of the bank, aligned to the model's width: text_BP -> text_BPE."""

    bank_KE: Tensor

    def __init__(self, config: SegVolConfig, bank: TextBank) -> None:
        super().__init__()
        self.register_buffer("bank_KE", bank.vectors_KE.clone())
        self.dim_align = nn.Linear(config.text_dim, config.hidden)

    def forward(self, text_BP: Tensor) -> Tensor:
        aligned: Tensor = self.dim_align(self.bank_KE[text_BP])
        return aligned
