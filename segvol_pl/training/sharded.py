"""Writing sharded checkpoints: every rank its own part, from copies, while training continues.

1. `taken_apart` splits a checkpoint into its large tensors and the rest. Ranks that hold the same tensor share the
   work: `own_share` leaves each tensor to one of them.
2. In a thread, the ranks write their parts into a new folder by torch.distributed.checkpoint, each its own shards.
3. When all have finished, rank 0 writes `checkpoint.pt`, the index of the parts, and gives the folder its name.

Threads of the ranks communicate over a group of their own, so that they are not mixed up with the training step. If a
rank fails, the folder is removed and all ranks raise the same error; the previous checkpoint stays. `model/sharded.py`
has the format, and reads it.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate

from segvol_pl.atomic import no_room, part_name, put
from segvol_pl.errors import SegVolError
from segvol_pl.model.sharded import FORMAT, HEADER, Part, Piece, Stored, index_json, part_of
from segvol_pl.training.ranks import gathered

Value = TypeVar("Value")
Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Ranks:
    """The ranks that write together."""

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    """None: a single process."""

    def agree(self, work: Callable[[], Value]) -> list[Value]:
        """Do `work` on every rank; its results in rank order. Raises on all ranks what it raised on any."""
        own: tuple[Value | None, Exception | None]
        try:
            own = work(), None
        except (SegVolError, OSError) as error:
            own = None, error
        except Exception as error:
            own = None, RuntimeError(f"rank {self.rank}: {type(error).__name__}: {error}")
        results: list[Any] = gathered(own, self.count, self.group)
        for _, failed in results:
            if failed is not None:
                raise failed
        return [value for value, _ in results]


def writing_ranks(timeout: timedelta) -> Ranks:
    """This job's ranks. The first call creates their group: all ranks must call together."""
    if not dist.is_initialized():
        return Ranks()
    world = dist.group.WORLD
    assert world is not None
    return Ranks(dist.get_rank(), dist.get_world_size(), _made(world, timeout))


@functools.lru_cache(maxsize=1)
def _made(world: dist.ProcessGroup, timeout: timedelta) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def taken_apart(tree: Any, at: Keys = ()) -> tuple[Any, dict[Keys, Tensor]]:
    """The tree with None in the place of its large tensors, and these by their keys. Single numbers stay."""
    if isinstance(tree, DTensor) or (isinstance(tree, Tensor) and tree.numel() > 1):
        return None, {at: tree}
    if not isinstance(tree, Mapping | list):
        return tree, {}
    found: dict[Keys, Tensor] = {}
    rest: dict[Any, Any] = {}
    for key, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        rest[key], tensors = taken_apart(part, (*at, key))
        found |= tensors
    return (rest if isinstance(tree, Mapping) else list(rest.values())), found


def own_share(tensors: dict[Keys, Tensor], rank: int, count: int) -> dict[Keys, Tensor]:
    """Those that this rank writes: of a tensor that several ranks hold alike, one of them, so that all write as much.

    All ranks compute the same division.
    """
    written: dict[int, list[int]] = {}
    own = {}
    for at in sorted(tensors, key=lambda at: (-tensors[at].numel(), str(at))):
        copies, copy = _copy(tensors[at], rank, count)
        loads = written.setdefault(copies, [0] * copies)
        least = loads.index(min(loads))
        loads[least] += tensors[at].nbytes
        if least == copy:
            own[at] = tensors[at]
    return own


def _copy(tensor: Tensor, rank: int, count: int) -> tuple[int, int]:
    """How many ranks hold the same values as this one, and its number among them."""
    if not isinstance(tensor, DTensor):
        return count, rank
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate()
    assert coordinates is not None
    copies, copy = 1, 0
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            copies, copy = copies * mesh.size(axis), copy * mesh.size(axis) + coordinates[axis]
    return copies, copy


class PartWriter(FileSystemWriter):
    """Writes a rank's part; rank 0 keeps the index in `tensors`, which torch would write as a pickle."""

    def __init__(self, folder: Path) -> None:
        # Tensors are in main memory. Copying ahead would use a GPU, in every process the first one.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.tensors: dict[str, tuple[str, list[int], list[Piece]]] = {}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Note where each rank has written which piece of a tensor, in place of torch's pickled file."""
        stored = {result.index: result.storage_data for each in results for result in each}
        pieces: dict[str, list[Piece]] = {name: [] for name in metadata.state_dict_metadata}
        for index, place in stored.items():
            tensor = metadata.state_dict_metadata[index.fqn]
            assert isinstance(tensor, TensorStorageMetadata)
            sizes = next(chunk.sizes for chunk in tensor.chunks if chunk.offsets == index.offset)
            if 0 not in sizes:  # a tensor may have fewer rows than there are ranks
                piece = Piece(list(index.offset or ()), list(sizes), place.relative_path, place.offset, place.length)
                pieces[index.fqn].append(piece)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            self.tensors[name] = dtype, list(tensor.size), pieces[name]


@dataclass(frozen=True)
class ShardedSave:
    """A checkpoint that is to be written: this rank's copies."""

    ranks: Ranks
    header: Any
    """Everything but the large tensors."""
    places: dict[str, Keys]
    """Name of every tensor, also of those that other ranks write -> its place in the checkpoint."""
    tensors: dict[str, Tensor]
    """Those that this rank writes, in main memory; DTensors with this rank's shard."""

    def locals(self) -> dict[str, Tensor]:
        """What this rank writes, without its place in complete tensors."""
        return {name: local_of(tensor) for name, tensor in self.tensors.items()}

    def write(self, path: Path, check: Callable[[], None]) -> None:
        """Write the checkpoint as the folder `path`. All ranks call together; it is complete when any of them returns.

        check: raises if this rank's tensors must not be saved.
        """
        folder = self.ranks.agree(lambda: self._folder(path))[0]
        try:
            self.ranks.agree(check)
            writer = self._parts(folder, path)
            own = f"__{self.ranks.rank}_"
            sums = self.ranks.agree(lambda: {file.name: part_of(file) for file in sorted(folder.glob(f"{own}*"))})
            parts = {name: part for each in sums for name, part in each.items()}
            self.ranks.agree(lambda: self._finish(writer, parts, folder, path))
        finally:
            if self.ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, path: Path) -> Path:
        """A new folder of rank 0. Its name was never looked for, so that no host remembers that it is missing."""
        folder = part_name(path)
        if self.ranks.rank == 0:
            folder.mkdir()
        return folder

    def _parts(self, folder: Path, path: Path) -> PartWriter:
        writer = PartWriter(folder)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            save_parts(self.tensors, storage_writer=writer, planner=planner, process_group=self.ranks.group)
        except CheckpointException as error:
            rank = min(error.failures)
            cause, _ = error.failures[rank]
            needed = sum(tensor.nbytes for tensor in self.locals().values())
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or shutil.disk_usage(path.parent).free < needed:
                raise no_room(path, needed) from error
            raise OSError(f"{path}: rank {rank} could not write its part: {cause}") from error
        return writer

    def _finish(self, writer: PartWriter, parts: dict[str, Part], folder: Path, path: Path) -> None:
        if self.ranks.rank:
            return
        for name, part in parts.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != part.bytes:
                raise SegVolError(
                    f"{path}: rank 0 does not see the part {name} that another rank wrote: "
                    "put run.out into a folder that all nodes share"
                )
        tensors = {name: Stored(list(self.places[name]), *stored) for name, stored in writer.tensors.items()}
        with (folder / HEADER).open("wb") as file:
            torch.save({"format": FORMAT, "checkpoint": self.header, "index": index_json(parts, tensors)}, file)
            file.flush()
            os.fsync(file.fileno())
        put(folder, path)


def sharded_save(checkpoint: dict[str, Any], timeout: timedelta, copied: Callable[[Any], Any]) -> ShardedSave:
    """Copy what this rank will write. All ranks call together.

    copied: copies all tensors of a tree to main memory.
    """
    ranks = writing_ranks(timeout)
    header, tensors = taken_apart(checkpoint)
    places = {".".join(map(str, at)): at for at in tensors}
    own = {".".join(map(str, at)): tensor for at, tensor in own_share(tensors, ranks.rank, ranks.count).items()}
    locals_ = {name: local_of(tensor) for name, tensor in own.items()}
    # One call: copies are valid until the next.
    header, held = copied((header if ranks.rank == 0 else None, locals_))
    return ShardedSave(ranks, header, places, {name: _again(own[name], held[name]) for name in own})


def local_of(tensor: Tensor) -> Tensor:
    """A DTensor's shard on this rank; any other tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _again(tensor: Tensor, copy: Tensor) -> Tensor:
    """The copy of a shard in the place of the shard. `from_local` would bring it to the GPUs of its mesh."""
    if not isinstance(tensor, DTensor):
        return copy
    return DTensor(copy, tensor._spec, requires_grad=False)
