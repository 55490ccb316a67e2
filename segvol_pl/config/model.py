"""The model, the vectors of its category names, and how it is computed and imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import CUSTOM, MISSING, Keys, check_triple, ranged, require


class Convention(StrEnum):
    """One of the places where the released weights need what the published code does."""

    consistent = "consistent"
    published = "published"


class Precision(StrEnum):
    """What products are computed in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class TextSource(StrEnum):
    """Where the vectors of category names come from."""

    auto = "auto"
    weights = "weights"
    clip = "clip"
    seeded = "seeded"


LANDMARKS = re.compile(rf"([1-9]\d*)\*({CUSTOM.pattern})")
"""A kind of prompt of the user's own, as `N*package.module:function`: the function marks N voxels of a structure."""

MASK_TOKENS = 4
"""Of the mask decoder, as in SAM; SegVol reads its mask off the first one alone."""


@dataclass
class SegVolConfig(Keys):
    """The architecture. The defaults are the published ViT-B (paper Sec. 2.1)."""

    section = "model."

    input_shape: list[int] = ranged([32, 256, 256], least=1)
    """Voxels (d, h, w) that the encoder sees."""
    patch_size: list[int] = ranged([4, 16, 16], least=1)
    """Voxels (d, h, w) of one token."""
    hidden_size: int = ranged(768, least=1)
    """Width of the encoder and of the decoder."""
    num_layers: int = ranged(12, least=1)
    """Transformer blocks of the encoder."""
    num_heads: int = ranged(12, least=1)
    """Attention heads of the encoder."""
    mlp_dim: int = ranged(3072, least=1)
    """Hidden width of the encoder's MLP."""
    decoder_layers: int = ranged(2, least=1)
    """Two-way attention blocks of the mask decoder."""
    decoder_heads: int = ranged(8, least=1)
    """Attention heads of the mask decoder."""
    decoder_mlp_dim: int = ranged(2048, least=1)
    """Hidden width of the mask decoder's MLP."""
    text_dim: int = ranged(512, least=1)
    """Width of the text bank's vectors (CLIP ViT-B/32: 512)."""
    coordinates: Convention = Convention.consistent
    """Positional encoding of prompts and tokens. `published`: d and h are divided by each other's extent, and the
    tokens' axes are ordered h, d, w, because the released weights were trained so."""
    landmarks: list[str] = field(default_factory=list)
    """Kinds of prompts of one's own, each `N*package.module:function`: N voxels that the function marks, with an
    embedding each, as a box has for its corners. Combinations name them without `N*`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.landmarks:
            require(
                LANDMARKS.fullmatch(entry) is not None, "model.landmarks", f"{entry!r} is no N*package.module:function"
            )
        require(len(self.landmark_counts) == len(self.landmarks), "model.landmarks", "names a function twice")
        check_triple("model.input_shape", self.input_shape)
        check_triple("model.patch_size", self.patch_size)
        whole = all(size % patch == 0 for size, patch in zip(self.input_shape, self.patch_size, strict=True))
        require(
            whole, "model.input_shape", f"{self.input_shape} is not a multiple of model.patch_size {self.patch_size}"
        )
        require(
            self.hidden_size % self.num_heads == 0,
            "model.hidden_size",
            f"{self.hidden_size} is not a multiple of model.num_heads",
        )
        inner = self.decoder_heads * 2
        require(
            self.hidden_size % inner == 0,
            "model.hidden_size",
            f"{self.hidden_size} is not a multiple of 2 x model.decoder_heads",
        )
        require(self.hidden_size % 8 == 0, "model.hidden_size", f"{self.hidden_size} is not a multiple of 8")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (d, h, w)."""
        d, h, w = (size // patch for size, patch in zip(self.input_shape, self.patch_size, strict=True))
        return d, h, w

    @property
    def landmark_counts(self) -> dict[str, int]:
        """`package.module:function` -> the number of voxels that it marks, of all kinds of `landmarks`."""
        found = (LANDMARKS.fullmatch(entry) for entry in self.landmarks)
        return {match[2]: int(match[1]) for match in found if match}


@dataclass
class TextConfig(Keys):
    """Where the vectors of category names come from."""

    section = "text."

    source: TextSource = TextSource.auto
    """clip: CLIP's text tower; weights: the bank or the text tower of the weights that training starts from; auto:
    weights where they can, else clip; seeded: fixed random vectors by name, where CLIP cannot be had."""
    clip_model: str = "openai/clip-vit-base-patch32"
    """Local folder or hub name of the CLIP model; of its tokenizer alone where the text tower is that of weights."""
    template: str = "A computerized tomography of a {}."
    """Sentence around a category name (paper Sec. 2.1)."""


@dataclass
class ImportConfig(Keys):
    """Convert released weights (.pth, .bin, .safetensors, the ViT's .ckpt) to a .safetensors for every command."""

    source: str = MISSING
    """Released file: SRC on the command line."""
    out: str = MISSING
    """File to write, .safetensors: DST on the command line."""
    categories: str | None = None
    """YAML whose category names the text bank gets, through the text tower in the file; none: no text prompts."""
    model: SegVolConfig = field(default_factory=lambda: SegVolConfig(coordinates=Convention.published))
    """The architecture that the file must have."""
    text: TextConfig = field(default_factory=TextConfig)
    allow: list[str] = field(default_factory=list)
    """Patterns of tensor names that may be missing, unknown or of another shape; otherwise any such is refused."""
