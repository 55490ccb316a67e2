"""Sharded training checkpoints: folders that all ranks write together (`training/sharded.py`), read by any number.

    last.ckpt/checkpoint.pt     everything but the large tensors, and the index: where each piece of a tensor lies
    last.ckpt/__N_0.distcp      the pieces that rank N wrote, in the format of torch.distributed.checkpoint

Nothing is unpickled as code: torch's own index would be a pickle, so this one is JSON, inside `checkpoint.pt`, which is
read like every other checkpoint (`weights_only`). So is each piece. The index also has the size and checksum of every
part. Names of tensors are their places in the complete checkpoint, such as `state_dict.model.mask_decoder.weight`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from segvol_pl.errors import CheckpointError

HEADER = "checkpoint.pt"
FORMAT = "segvol_pl sharded/1"
PART = re.compile(r"__\d+_\d+\.distcp")
"""Names of parts; no other file is opened, whatever an index says."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
} | {"bool": torch.bool}
WEIGHTS = "state_dict."
"""Start of the names of weights."""
READ_AT_ONCE = 2**24
"""Bytes to read at once for a checksum."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where it is stored."""

    offsets: list[int]
    """Its first element in the tensor, per axis."""
    sizes: list[int]
    file: str
    start: int
    """First byte in the file."""
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    at: list[str | int]
    """Its place in the checkpoint: the keys that lead to it."""
    dtype: str
    shape: list[int]
    pieces: list[Piece]

    def problem(self, parts: Mapping[str, Part]) -> str:
        """What is wrong with it; empty if its pieces can fill it."""
        if self.dtype not in DTYPES:
            return f"has the unknown type {self.dtype}"
        for piece in self.pieces:
            ends = zip(piece.offsets, piece.sizes, self.shape, strict=True)
            inside = all(first >= 0 and size > 0 and first + size <= whole for first, size, whole in ends)
            held = math.prod(piece.sizes) * DTYPES[self.dtype].itemsize <= piece.length
            stored = piece.file in parts and 0 <= piece.start <= parts[piece.file].bytes - piece.length
            if not (inside and held and stored):
                return f"has a piece outside of it or of {piece.file}"
        whole = sum(math.prod(piece.sizes) for piece in self.pieces) == math.prod(self.shape)
        return "" if whole else "is not complete"


@dataclass(frozen=True)
class Part:
    """Size and CRC-32 of a file."""

    bytes: int
    checksum: int


@dataclass(frozen=True)
class Location:
    """Where a piece lies, under the names that torch's reader uses."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


@dataclass(frozen=True)
class Sharded:
    """A sharded checkpoint, of which only `checkpoint.pt` has been read."""

    path: Path
    header: dict[str, Any]
    """The complete checkpoint, with None in the place of each tensor of `tensors`."""
    parts: dict[str, Part]
    tensors: dict[str, Stored]

    def load_into(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors by name, on any device; of a DTensor each rank reads its own shard. Raises CheckpointError.

        Ranks need not call this together.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        if lacking := targets.keys() - self.tensors.keys():
            raise CheckpointError(f"{self.path} is of another model: it lacks {min(lacking)}: check the model section")
        for name, target in targets.items():
            if list(target.shape) != (shape := self.tensors[name].shape):
                raise CheckpointError(f"{self.path} is of another model: {name} is {shape}, not {list(target.shape)}")
        try:
            with warnings.catch_warnings():
                # torch says that it does not ask other ranks, which is what is wanted.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(targets, storage_reader=self._reader(), planner=_planner(), no_dist=True)
        except CheckpointException as error:
            cause = next((str(cause) for cause, _ in error.failures.values()), "") or "no reason given"
            raise CheckpointError(f"{self.path}: cannot be read ({cause.splitlines()[0]}): is it complete?") from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read complete tensors to the CPU. Raises CheckpointError."""
        stored = {name: self.tensors[name] for name in names}
        read = {name: torch.empty(each.shape, dtype=DTYPES[each.dtype]) for name, each in stored.items()}
        self.load_into(read)
        return read

    def complete(self) -> dict[str, Any]:
        """The complete checkpoint, as if it had been read from one file. Raises CheckpointError."""
        for name, tensor in self.read(self.tensors).items():
            _put(self.header, self.tensors[name].at, tensor, self.path)
        return self.header

    def weights(self) -> dict[str, Tensor]:
        """The module's tensors, in the order and under the names of a complete checkpoint. Raises CheckpointError."""
        small = self.header.get("state_dict")
        if not isinstance(small, dict):
            raise CheckpointError(f"{self.path}: holds no weights: is it a checkpoint of segvol-pl?")
        read = self.read(name for name in self.tensors if name.startswith(WEIGHTS))
        filled = {name: read.get(WEIGHTS + str(name), value) for name, value in small.items()}
        return {str(name): value for name, value in filled.items() if isinstance(value, Tensor)}

    def _reader(self) -> Any:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, Location] = {}
        for name, stored in self.tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in stored.pieces
            ]
            properties = TensorProperties(dtype=DTYPES[stored.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
            for piece in stored.pieces:
                places[MetadataIndex(name, piece.offsets)] = Location(piece.file, piece.start, piece.length)
        metadata = Metadata(tensors, storage_data=places)

        class Reader(FileSystemReader):
            """Has the index already. torch's method would unpickle a file."""

            def read_metadata(self) -> Metadata:
                return metadata

        return Reader(self.path)


def _planner() -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _put(tree: Any, at: list[str | int], tensor: Tensor, path: Path) -> None:
    try:
        for key in at[:-1]:
            tree = tree[key]
        empty = tree[at[-1]] is None
    except (KeyError, IndexError, TypeError):
        empty = False
    if not empty or not isinstance(tree, MutableMapping | list):
        raise CheckpointError(f"{path}: has no place for {'.'.join(map(str, at))}: take an earlier checkpoint")
    tree[at[-1]] = tensor  # type: ignore[index]


def index_json(parts: Mapping[str, Part], tensors: Mapping[str, Stored]) -> str:
    """The index as JSON; files are numbered, because many pieces name them."""
    number = {name: place for place, name in enumerate(parts)}
    rows = {
        name: [
            stored.at,
            stored.dtype,
            stored.shape,
            [[each.offsets, each.sizes, number[each.file], each.start, each.length] for each in stored.pieces],
        ]
        for name, stored in tensors.items()
    }
    return json.dumps({"parts": {name: asdict(part) for name, part in parts.items()}, "tensors": rows})


def open_sharded(path: Path) -> Sharded:
    """Read what a sharded checkpoint holds, without its tensors and without unpickling code. Raises CheckpointError."""
    header = path / HEADER
    if not header.is_file():
        raise CheckpointError(f"{path}: is a folder without {HEADER}, so no checkpoint: copy the folder again")
    try:
        raw = torch.load(header, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{header}: holds more than tensors and plain values, and is refused: code could hide in it"
        ) from error
    except (RuntimeError, EOFError, BadZipFile, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{header}: cannot be read ({reason}): is it complete?") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("checkpoint"), dict):
        raise CheckpointError(f"{header}: is no sharded checkpoint of this version of segvol-pl")
    parts, tensors = _index(raw.get("index"), header)
    return Sharded(path, raw["checkpoint"], parts, tensors)


def _index(text: Any, header: Path) -> tuple[dict[str, Part], dict[str, Stored]]:
    try:
        raw = json.loads(text)
        parts = {str(name): Part(int(part["bytes"]), int(part["checksum"])) for name, part in raw["parts"].items()}
        files = list(parts)
        tensors = {
            str(name): Stored(
                list(at),
                str(dtype),
                [int(size) for size in shape],
                [
                    Piece(first, sizes, files[number], int(start), int(length))
                    for first, sizes, number, start, length in pieces
                ],
            )
            for name, (at, dtype, shape, pieces) in raw["tensors"].items()
        }
        problems = (f"{name} {problem}" for name, each in tensors.items() if (problem := each.problem(parts)))
        unknown = (f"{name} is no name of a part" for name in parts if not PART.fullmatch(name))
        problem = next(unknown, "") or next(problems, "")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{header}: its index cannot be read: take another checkpoint") from error
    if problem:
        raise CheckpointError(f"{header}: its index is wrong ({problem}): take another checkpoint")
    return parts, tensors


def check_parts(path: Path) -> None:
    """Read all parts. Raises CheckpointError if one is missing, or if a byte differs from what was written."""
    for name, part in open_sharded(path).parts.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: lacks its part {name}: copy the complete folder")
        if part_of(file) != part:
            raise CheckpointError(f"{path}: is damaged (wrong size or checksum of {name})")


def part_of(file: Path) -> Part:
    """Size and checksum of a file."""
    checksum = size = 0
    with file.open("rb") as opened:
        while block := opened.read(READ_AT_ONCE):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return Part(size, checksum)
