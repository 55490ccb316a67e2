"""Text: category names become vectors once, before training; the model holds only the table and a projection.

No training process loads CLIP: `TextBank.from_clip` runs its text tower once per name, and the checkpoint holds the
bank. Without CLIP, `TextBank.seeded` gives each name a fixed random vector: names are distinguished, but their meaning
is lost.
"""

from __future__ import annotations

import difflib
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segvol_pl.config import SegVolConfig, TextConfig, TextSource
from segvol_pl.errors import TextError, UnknownCategory

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class TextBank:
    """What a text prompt may be, and the vectors_KE of it (float32): K names of categories, then their synonyms.

    Args:
        names: of the categories, the first rows.
        vectors_KE: a row for each of the names, then for each of the synonyms.
        synonyms: synonym -> category, in the order of their rows.
    """

    def __init__(self, names: Sequence[str], vectors_KE: Tensor, synonyms: Mapping[str, str] | None = None) -> None:
        self.names = list(names)
        self.synonyms = dict(synonyms or {})
        self.vectors_KE = vectors_KE
        self._rows = {text: row for row, text in enumerate(self.texts)}

    @property
    def texts(self) -> list[str]:
        """Names and synonyms, in the order of the rows."""
        return [*self.names, *self.synonyms]

    def index(self, name: str) -> int:
        """The row of a name or synonym. Raises UnknownCategory with the nearest ones."""
        if name not in self._rows:
            if not self.names:
                raise UnknownCategory("this model holds no text bank: import its weights with categories=FILE")
            near = difflib.get_close_matches(name, self.texts, n=3, cutoff=0.5) or self.names[:5]
            raise UnknownCategory(
                f"category {name!r} is not in the text bank of this model; nearest: {', '.join(near)}"
            )
        return self._rows[name]

    def rows(self, names: Sequence[str], synonyms: Mapping[str, str] | None = None) -> TextBank:
        """The bank restricted to these categories and synonyms. Raises UnknownCategory.

        Args:
            names: of categories; each is a name or a synonym in this bank.
            synonyms: synonym -> category. None: those that this bank has for these categories.
        """
        if synonyms is None:
            own = self.synonyms.items()
            synonyms = {other: name for other, name in own if name in names and other not in names}
        return TextBank(names, self.vectors_KE[[self.index(text) for text in (*names, *synonyms)]], synonyms)

    @classmethod
    def build(cls, names: Sequence[str], config: TextConfig, dim: int) -> TextBank:
        """Create the bank by `config.source`. Raises TextError if CLIP cannot be loaded or is not `dim` wide."""
        if config.source is TextSource.seeded:
            log.warning("text bank: fixed random vectors seeded by the category names, not CLIP (text.source=seeded)")
            return cls.seeded(names, dim)
        bank = cls.from_clip(names, config)
        if bank.vectors_KE.shape[1] != dim:
            raise TextError(
                f"text.clip_model: {config.clip_model} has width {bank.vectors_KE.shape[1]}, model.text_dim is {dim}"
            )
        return bank

    @classmethod
    def empty(cls, dim: int) -> TextBank:
        """A bank without names; prompts without text use its one row of zeros."""
        return cls([], torch.zeros(1, dim))

    @classmethod
    def seeded(cls, names: Sequence[str], dim: int) -> TextBank:
        """Random vectors (K, dim), each seeded by its name."""
        rows = [np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(dim) for name in names]
        return cls(names, torch.tensor(np.stack(rows), dtype=torch.float32))

    @classmethod
    def from_clip(cls, names: Sequence[str], config: TextConfig) -> TextBank:
        """CLIP's pooled output of the template filled with each name (paper Sec. 2.1). Raises TextError."""
        from transformers import CLIPTextModel

        tower = _loaded(CLIPTextModel.from_pretrained, config.clip_model)
        return cls._of_sentences(names, tower, config.clip_model, config)

    @classmethod
    def of_tower(cls, names: Sequence[str], tower: dict[str, Tensor], config: TextConfig, path: Path) -> TextBank:
        """Like `from_clip`, by the text tower in the weights at `path`, under transformers' names.

        The tokenizer is taken from the folder of `path`, or else from `config.clip_model`. Raises TextError.
        """
        if not tower:
            raise TextError(f"{path}: carries no text tower: name a CLIP by text.clip_model, or use text.source=seeded")
        local = any((path.parent / name).exists() for name in TOKENIZER_FILES)
        return cls._of_sentences(
            names, text_tower(tower, path), str(path.parent) if local else config.clip_model, config
        )

    @classmethod
    def _of_sentences(cls, names: Sequence[str], tower: nn.Module, tokenizer: str, config: TextConfig) -> TextBank:
        from transformers import CLIPTokenizer

        sentences = [config.template.format(name) for name in names]
        tokens = _loaded(CLIPTokenizer.from_pretrained, tokenizer)(sentences, padding=True, return_tensors="pt")
        with torch.inference_mode():
            vectors_KE = tower.eval()(**tokens).pooler_output
        return cls(names, vectors_KE.float().clone())


def _loaded(load: Callable[[str], Any], clip: str) -> Any:
    try:
        return load(clip)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TextError(
            f"text.clip_model: cannot load {clip} ({reason}); give a local folder of CLIP's files, or, "
            "for training without CLIP, text.source=seeded"
        ) from error


def text_tower(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """Build CLIP's text tower from its weights, with the size of their shapes. Raises TextError.

    All released CLIP towers have heads of width 64, and the last token of the vocabulary ends a text.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    # Older versions of transformers have one more level in the names.
    short = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    try:
        vocabulary, hidden = short["embeddings.token_embedding.weight"].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=len(short["encoder.layers.0.mlp.fc1.bias"]),
            num_hidden_layers=len({name.split(".")[2] for name in short if name.startswith("encoder.layers.")}),
            num_attention_heads=max(hidden // 64, 1),
            max_position_embeddings=len(short["embeddings.position_embedding.weight"]),
            eos_token_id=vocabulary - 1,
        )
        tower = CLIPTextModel(config)
        names = tower.state_dict()
        tower.load_state_dict({name: short[name.removeprefix("text_model.")] for name in names})
    except (KeyError, RuntimeError) as error:
        raise TextError(f"{path}: its text tower is incomplete ({str(error).splitlines()[0]})") from error
    return tower


class TextEncoder(nn.Module):
    """Look up rows of the bank and project them to the model's width: text_BP -> text_BPE."""

    bank_KE: Tensor

    def __init__(self, config: SegVolConfig, bank: TextBank) -> None:
        super().__init__()
        self.register_buffer("bank_KE", bank.vectors_KE.clone())
        self.dim_align = nn.Linear(config.text_dim, config.hidden_size)

    def forward(self, text_BP: Tensor) -> Tensor:
        """Project the rows text_BP (int64) of the bank to text_BPE."""
        return self.project(self.bank_KE[text_BP])

    def project(self, vectors_BPE: Tensor) -> Tensor:
        """Project vectors of the bank's kind to the model's width."""
        aligned: Tensor = self.dim_align(vectors_BPE)
        return aligned
