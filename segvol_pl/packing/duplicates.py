"""Equal voxels in folders of shards: in two data sets, or in two splits of one (command `overlap`).

Packing stores the hash of a case's voxels in canonical axes, so copies are found whatever their file's name, format or
orientation. Only indexes are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segvol_pl.credentials import masked
from segvol_pl.data.shard_index import load_index
from segvol_pl.data.store import ShardSource, Store
from segvol_pl.errors import ShardError


@dataclass(frozen=True)
class Copy:
    """A sample whose voxels another sample has too."""

    folder: str
    key: str
    split: str


def find_duplicates(folders: Sequence[ShardSource]) -> list[list[Copy]]:
    """Return the groups of samples that hold equal voxels, first those in different splits.

    Raises ShardError for a folder that cannot be read, or whose index is older than the hashes.
    """
    tables = [load_index(Store(folder)).samples for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        if not all(content for (content,) in table.texts("content")):
            raise ShardError(f"the index of {folder} holds no content hashes: run segvol-pl index {folder}")
    prints = [table.fingerprints("content") for table in tables]
    values, counts = np.unique(np.concatenate([*prints, np.zeros(0, np.uint64)]), return_counts=True)
    found: dict[str, list[Copy]] = {}
    for folder, table, own in zip(folders, tables, prints, strict=True):
        for record in table.where(np.isin(own, values[counts > 1])):
            found.setdefault(record.content, []).append(Copy(masked(str(folder)), record.key, record.split))
    groups = [group for group in found.values() if len(group) > 1]
    return sorted(groups, key=lambda group: (not crosses_splits(group), group[0].folder, group[0].key))


def crosses_splits(group: Sequence[Copy]) -> bool:
    """Return whether equal voxels are in more than one split: trained on and tested on."""
    return len({copy.split for copy in group}) > 1
