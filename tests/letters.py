"""A CLIP text tower of random weights and a tokenizer of single letters, as `save_pretrained` lays them out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ENDS = ("<|startoftext|>", "<|endoftext|>")
LETTERS = [chr(code) for code in range(33, 127)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *ENDS]


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt."""
    (folder / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_clip(folder: Path) -> Path:
    """The tower, 32 wide, and the tokenizer."""
    write_tokenizer(folder)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=WORDS.index(ENDS[0]),
        eos_token_id=WORDS.index(ENDS[1]),
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder
