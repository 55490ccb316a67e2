"""Check a folder of shards (command `verify`): compare every hash, decode every array."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from segvol_pl.data.damage import DamagedSample
from segvol_pl.data.frames import CHUNK, decode_alone
from segvol_pl.data.index_builder import sha256_of
from segvol_pl.data.sample_table import SampleRecord
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.shard_index import Shard, load_index, size_problem
from segvol_pl.data.shard_reader import arrays_of, read_array, read_facts, read_member
from segvol_pl.data.store import ShardSource, Store
from segvol_pl.errors import ShardError, StoreError


def verify(folder: ShardSource) -> list[str]:
    """Check sizes, the sha256 of shards and of members, and decoding, of a local folder of shards. Reads in parallel.

    Returns:
        One line per fault, with shard, sample, and first and last byte of the member. No line means that every byte is
        as packed; of shards without hashes, that every array can be decoded and has the stated shape and dtype.

    Raises:
        ShardError: the folder is not local, or has no index.
    """
    # No retries: report where a disk fails.
    store = Store(folder, retry_seconds=0.0)
    if not store.local:
        raise ShardError(f"{folder} is not a local folder: run segvol-pl verify where the shards lie")
    index = load_index(store)
    samples = index.samples.by_shard()
    decode_alone()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = threads.map(lambda shard: _faults_of(store, shard, samples.get(shard.name, ())), index.shards)
        return [fault for faults in found for fault in faults]


def _faults_of(store: Store, shard: Shard, records: Sequence[SampleRecord]) -> list[str]:
    path = Path(store.place(shard.name))
    if problem := size_problem(path, shard):
        return [problem]
    faults = [fault for record in records for fault in sample_faults(store, record)]
    if not faults and sha256_of(path) != shard.sha256:
        return [f"shard {path}: its sha256 is not the indexed one although all samples are sound: copy it again"]
    return faults


def sample_faults(store: Store, record: SampleRecord) -> list[str]:
    """The faults of one sample, also those that a new index would hide: its facts hold the hashes taken at packing."""
    try:
        facts = read_facts(store, record)
    except (DamagedSample, StoreError) as error:
        return [_at(error, record, Member.FACTS)]
    faults = []
    for member in arrays_of(facts, record.members):
        try:
            _decode_all(store, record, facts, member)
        except (DamagedSample, StoreError) as error:
            faults.append(_at(error, record, member))
    return faults


def _decode_all(store: Store, record: SampleRecord, facts: Facts, member: Member) -> None:
    """Decode every chunk of an array as a loader does, a few at a time. Raises DamagedSample, StoreError."""
    if member.value in facts.chunks:
        # Parts are only checked against the hashes of their chunks.
        read_member(store, record, member, facts.members.get(member.value, ""))
    array = read_array(store, record, facts, member)
    for start in range(0, array.shape[0], CHUNK[0]):
        array[start : start + CHUNK[0]]


def _at(error: DamagedSample | StoreError, record: SampleRecord, member: Member) -> str:
    offset, size = record.members.get(member.value, (0, 0))
    cause = error.damage.value if isinstance(error, DamagedSample) else "not read"
    return f"{error} [{cause}, bytes {offset} to {offset + size} of {record.shard}]"
