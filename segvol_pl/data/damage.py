"""What can be wrong with one sample of a folder that is otherwise fine.

Readers raise `DamagedSample`; the stream replaces the sample and reports the `Damage` by its number in the batch.
"""

from __future__ import annotations

from enum import Enum

from segvol_pl.errors import ShardError


class Damage(Enum):
    """What is wrong with a sample's bytes."""

    MISSING = "missing"  # the shard, or the member, is not there
    SHORT = "short"  # the shard ends before the member does
    ALTERED = "altered"  # the bytes are not those that were packed
    UNREADABLE = "unreadable"  # the bytes are no facts and no array


DAMAGES = list(Damage)
"""In a batch, a damage is its index in this list."""


class DamagedSample(ShardError):
    """One sample that cannot be used, though its folder can; `damage` says why."""

    def __init__(self, message: str, damage: Damage) -> None:
        super().__init__(message)
        self.damage = damage
