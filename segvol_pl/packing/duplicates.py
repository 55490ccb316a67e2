"""What folders of shards have in common: the same voxels in two data sets, or in two splits (verb `overlap`).

Packing names a case by the hash of its voxels in canonical axes, so that copies are found whatever their file's name,
format or orientation. Only indexes are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segvol_pl.credentials import masked
from segvol_pl.data.shards import load_index
from segvol_pl.data.store import Source, Store
from segvol_pl.errors import ShardError


@dataclass(frozen=True)
class Place:
    """Where a sample lies."""

    folder: str
    key: str
    split: str


def overlap(folders: Sequence[Source]) -> list[list[Place]]:
    """The groups of samples that hold the same voxels, those in different splits first.

    Raises ShardError for a folder that cannot be read, or whose index was written before it held the hashes.
    """
    found: dict[str, list[Place]] = {}
    for folder in folders:
        for record in load_index(Store(folder)).samples:
            if not record.content:
                raise ShardError(f"the index of {folder} holds no content hashes: run segvol-pl index {folder}")
            found.setdefault(record.content, []).append(Place(masked(str(folder)), record.key, record.split))
    groups = [group for group in found.values() if len(group) > 1]
    return sorted(groups, key=lambda group: (not leaks(group), group[0].folder, group[0].key))


def leaks(group: Sequence[Place]) -> bool:
    """Whether the same voxels are trained on and tested on."""
    return len({place.split for place in group}) > 1
