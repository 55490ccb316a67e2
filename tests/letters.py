"""A CLIP tokenizer of single letters, as `save_pretrained` lays it out."""

from __future__ import annotations

import json
from pathlib import Path

ENDS = ("<|startoftext|>", "<|endoftext|>")
LETTERS = [chr(code) for code in range(33, 127)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *ENDS]


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt."""
    (folder / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
