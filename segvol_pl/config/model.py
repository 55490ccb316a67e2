"""The schemas of the model, its text vectors and its import."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from segvol_pl.config.fields import CUSTOM, MISSING, Keys, check_triple, ranged, require


class Convention(StrEnum):
    """Which of two conventions to follow: our own, or the one that the released weights were trained with."""

    consistent = "consistent"
    published = "published"


class Precision(StrEnum):
    """Number format of matrix products."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class TextSource(StrEnum):
    """Where to get the vectors of category names."""

    auto = "auto"
    weights = "weights"
    clip = "clip"
    seeded = "seeded"


LANDMARKS = re.compile(rf"([1-9]\d*)\*({CUSTOM.pattern})")
"""A custom prompt type, `N*package.module:function`: the function marks N voxels of a structure."""

LINE = "line"
"""The shipped prompt type: the ends of a structure's longest diameter in an axial slice."""

SHIPPED_LANDMARKS = {LINE: (2, "segvol_pl.imaging.lines:recist_line")}
"""Name of a shipped prompt type -> how many voxels its function marks, and the function."""

FINER = 4
"""Voxels of the decoder's masks along each axis of a token."""

MASK_TOKENS = 4
"""Mask tokens of the decoder, as in SAM; SegVol uses only the mask of the first."""


def check_widths(section: str, hidden: int, heads: int, decoder_heads: int) -> None:
    """Raise ConfigError unless heads and the decoder's channels divide the width of a model."""
    key = f"{section}hidden_size"
    require(hidden % heads == 0, key, f"{hidden} is not a multiple of {section}num_heads")
    require(hidden % (2 * decoder_heads) == 0, key, f"{hidden} is not a multiple of 2 x {section}decoder_heads")
    require(hidden % 8 == 0, key, f"{hidden} is not a multiple of 8")


@dataclass
class SegVolConfig(Keys):
    """The model architecture. The defaults are the published ViT-B (paper Sec. 2.1)."""

    section = "model."

    input_shape: list[int] = ranged([32, 256, 256], least=1)
    """Input size of the encoder (voxels: d, h, w)."""
    patch_size: list[int] = ranged([4, 16, 16], least=1)
    """Size of one token (voxels: d, h, w)."""
    hidden_size: int = ranged(768, least=1)
    """Width of the encoder and the decoder."""
    num_layers: int = ranged(12, least=1)
    """Transformer blocks in the encoder."""
    num_heads: int = ranged(12, least=1)
    """Attention heads in the encoder."""
    mlp_dim: int = ranged(3072, least=1)
    """Hidden width of the encoder's MLPs."""
    decoder_layers: int = ranged(2, least=1)
    """Two-way attention blocks in the mask decoder."""
    decoder_heads: int = ranged(8, least=1)
    """Attention heads in the mask decoder."""
    decoder_mlp_dim: int = ranged(2048, least=1)
    """Hidden width of the mask decoder's MLPs."""
    text_dim: int = ranged(512, least=1)
    """Width of the text vectors (CLIP ViT-B/32: 512)."""
    coordinates: Convention = Convention.consistent
    """Positional encoding of prompts and tokens. published: reproduce the released weights' training, which divided d
    and h by each other's extent and ordered the axes of the tokens h, d, w."""
    mask_prompt: bool = False
    """Whether a prompt may come with a mask found before: the coarse mask in zoom-in windows, the previous mask when
    refining. Not in the paper. Train it with prompts.mask_fraction."""
    point_maps: bool = False
    """Whether points, besides being tokens, enter as two maps next to the mask: a blurred spot at each point inside,
    and at each point outside. Clicks then act where they are. Not in the paper. Needs model.mask_prompt."""
    landmarks: list[str] = field(default_factory=list)
    """Further prompt types. line: the two ends of the longest diameter in an axial slice (RECIST).
    N*package.module:function: your own function marks N voxels, and each of them gets its own embedding, like the
    corners of a box. Prompt combinations name the function without `N*`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in self.landmarks:
            known = entry in SHIPPED_LANDMARKS or LANDMARKS.fullmatch(entry) is not None
            named = ", ".join(SHIPPED_LANDMARKS)
            require(known, "model.landmarks", f"{entry!r} is no N*package.module:function, nor one of: {named}")
        require(len(self.landmark_counts) == len(self.landmarks), "model.landmarks", "names a function twice")
        require(self.mask_prompt or not self.point_maps, "model.point_maps", "needs model.mask_prompt=true")
        check_triple("model.input_shape", self.input_shape)
        check_triple("model.patch_size", self.patch_size)
        whole = all(size % patch == 0 for size, patch in zip(self.input_shape, self.patch_size, strict=True))
        require(
            whole, "model.input_shape", f"{self.input_shape} is not a multiple of model.patch_size {self.patch_size}"
        )
        check_widths(self.section, self.hidden_size, self.num_heads, self.decoder_heads)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (d, h, w)."""
        d, h, w = (size // patch for size, patch in zip(self.input_shape, self.patch_size, strict=True))
        return d, h, w

    @property
    def encoder_linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of the encoder's blocks, which can be adapted: name in the model -> inputs and outputs."""
        hidden, wide = self.hidden_size, self.mlp_dim
        sizes = {
            "attn.qkv": (hidden, 3 * hidden),
            "attn.out_proj": (hidden, hidden),
            "mlp.linear1": (hidden, wide),
            "mlp.linear2": (wide, hidden),
        }
        blocks = (f"image_encoder.blocks.{place}" for place in range(self.num_layers))
        return {f"{block}.{layer}": size for block in blocks for layer, size in sizes.items()}

    @property
    def mask_shape(self) -> tuple[int, int, int]:
        """Voxels along (d, h, w) of the decoder's masks, and of the masks that prompts come with."""
        d, h, w = (FINER * size for size in self.grid)
        return d, h, w

    @property
    def dense_channels(self) -> int:
        """Maps that a prompt adds to the image tokens: its mask, and its points inside and outside."""
        return 3 if self.point_maps else 1

    @property
    def landmark_counts(self) -> dict[str, int]:
        """`line` or `package.module:function` -> the number of voxels that it marks, for each of `landmarks`."""
        counts = {}
        for entry in self.landmarks:
            if entry in SHIPPED_LANDMARKS:
                counts[entry] = SHIPPED_LANDMARKS[entry][0]
            elif match := LANDMARKS.fullmatch(entry):
                counts[match[2]] = int(match[1])
        return counts


@dataclass
class TextConfig(Keys):
    """Where to get the vectors of category names."""

    section = "text."

    source: TextSource = TextSource.auto
    """clip: CLIP's text tower. weights: the text bank or text tower of the weights that training starts from. auto:
    weights if they have one, otherwise clip. seeded: fixed random vectors derived from the names, for use without
    CLIP."""
    clip_model: str = "openai/clip-vit-base-patch32"
    """Local folder or hub name of the CLIP model. Only its tokenizer is used if the weights bring their own text
    tower."""
    template: str = "A computerized tomography of a {}."
    """Sentence that surrounds a category name (paper Sec. 2.1)."""
    synonyms: str | None = None
    """YAML file with a section `synonyms` of other names of categories (`liver: [hepar]`), such as categories.yaml.
    Training draws among the names of a category. Synonyms of `weights` stay. null: no others; `finetune` and `import`
    then take those of their `categories`."""


@dataclass
class ImportConfig(Keys):
    """Convert released weights (.pth, .bin, .safetensors, or the ViT's .ckpt) to a .safetensors file that every command
    reads."""

    source: str = MISSING
    """Released file. SRC on the command line."""
    out: str = MISSING
    """File to write (.safetensors). DST on the command line."""
    categories: str | None = None
    """YAML file of category names to put into the text bank, encoded with the text tower in the released file. null: no
    text prompts."""
    model: SegVolConfig = field(default_factory=lambda: SegVolConfig(coordinates=Convention.published))
    """Architecture that the file must have."""
    text: TextConfig = field(default_factory=TextConfig)
    allow: list[str] = field(default_factory=list)
    """Patterns of tensor names that may be missing, unknown, or of a different shape. All other mismatches are
    errors."""
