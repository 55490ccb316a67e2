"""The contract between packing, streaming and training: names, dtypes, shapes, letters.

Letters in array names give the axes, in order:

    B batch    C channel    D H W voxel axes (superior, anterior, right: index grows that way)
    K masks of one volume    P prompts of one volume    N points of one prompt
    T image tokens    E embedding    S prompt tokens

A sample in a shard is a run of tar members `<key>.<member>`, in the order of `Member`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from segvol_pl.errors import SampleError
from segvol_pl.imaging.intensity import Intensity

SCHEMA = 1


class Member(str, Enum):
    """The members of one sample, in the order in which they stand in the tar."""

    FACTS = "json"
    CT = "ct.b2nd"  # int16 (D,H,W), HU at native resolution, cropped to the body
    LABEL = "label.b2nd"  # uint8 or uint16 (D,H,W); absent for unlabelled volumes
    OVERVIEW = "overview.b2nd"  # int16, the complete volume at the model's input shape
    OVERVIEW_LABEL = "overview_label.b2nd"  # the label map by nearest, at the same shape
    REGIONS = "regions.b2nd"  # uint16, cleaned pseudo-label regions on the overview's grid, 0 = none


class Split(str, Enum):
    """Train or test, decided by the hash of a case's voxels."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True)
class CategoryFacts:
    """Where one category lies in the packed volume. Voxel indices are (d, h, w)."""

    values: list[int]
    voxels: int
    box: list[int]
    anchors: list[list[int]]
    """Voxels of the category, drawn at packing: centres for foreground crops."""


@dataclass(frozen=True)
class ChunkTable:
    """The chunks of one member, so that a crop reads and checks only those that it touches."""

    shape: list[int]
    """(D,H,W) of the array."""
    chunk: list[int]
    """(D,H,W) of a chunk."""
    bytes: int
    """Of the complete member."""
    start: int
    """First byte of the first chunk; the others follow without gaps, in C order."""
    sizes: list[int]
    """Bytes of each chunk; 0 for a chunk of a single value, which takes no space."""
    hashes: str
    """16 hex digits of each chunk's hash, concatenated."""
    ends: str
    """The same of the frame's head, the 32-byte header of the first chunk, and the frame's tail, concatenated."""
    hash: str = "sha256"
    """How they are hashed: xxh3 (64 bits, in its canonical form), or the first 16 digits of sha256."""


@dataclass(frozen=True)
class Facts:
    """`<key>.json`: what is known of one sample without decoding it."""

    key: str
    shape: list[int]
    """(D,H,W) of the packed volume."""
    spacing: list[float] | None
    """mm along d, h, w. None: unknown, the source has none."""
    affine: list[list[float]] | None
    """4x4: packed voxel (d, h, w, 1) -> RAS millimetres. None: unknown."""
    source: dict[str, str]
    """image, image_sha256 and, where labelled, label, label_sha256. File names, never folders. content_sha256 of the
    voxels. If the source format lost something: form, published_split, values, axes."""
    dataset: str
    split: str
    modality: str
    intensity: Intensity
    categories: dict[str, CategoryFacts]
    """The categories present, by name. Empty for an unlabelled volume."""
    labelled: bool
    overview_shape: list[int]
    members: dict[str, str] = field(default_factory=dict)
    """Member ending -> sha256 of its bytes."""
    chunks: dict[str, ChunkTable] = field(default_factory=dict)
    """Member ending -> its chunks, for large members, which are read in parts."""
    encoding: int = 1
    """How its arrays are encoded, see `frames.ENCODING`; 1 in facts that were written before it was stated."""
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The bytes of `<key>.json`: the same facts give the same."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Facts:
        """Raises SampleError for another schema or missing keys."""
        if raw.get("schema") != SCHEMA:
            raise SampleError(f"sample {raw.get('key', '?')}: schema {raw.get('schema')} not {SCHEMA}: pack it again")
        try:
            intensity = Intensity(**raw["intensity"])
            categories = {name: CategoryFacts(**facts) for name, facts in raw["categories"].items()}
            chunks = {ending: ChunkTable(**table) for ending, table in raw.get("chunks", {}).items()}
            return cls(**{**raw, "intensity": intensity, "categories": categories, "chunks": chunks})
        except (KeyError, TypeError, AttributeError) as error:
            raise SampleError(f"sample {raw.get('key', '?')}: facts are incomplete ({error}): pack it again") from error


@dataclass(frozen=True)
class Sample:
    """One encoded sample, as `write_shard` writes it."""

    key: str
    members: dict[Member, bytes]
