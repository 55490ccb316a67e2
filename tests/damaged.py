"""Shards, damaged on purpose."""

from __future__ import annotations

from pathlib import Path

from segvol_pl.data.sample_table import SampleRecord
from segvol_pl.data.schema import Member


def flip(folder: Path, record: SampleRecord, member: Member) -> None:
    """Invert a byte in the middle of a member."""
    path, (offset, size) = folder / record.shard, record.members[member.value]
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 0xFF
    path.write_bytes(content)
