"""Staged cases into shards, and back.

1. `drop_duplicates` leaves out the cases whose voxels another case has too.
2. `join` writes the shards: the cases in the order of their keys, each split in shards of its own.
3. `take_apart` stages the samples of a finished folder again, so that cases which were added or repaired can join them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from segvol_pl.data.frames import ENCODING
from segvol_pl.data.sample_table import SampleRecord
from segvol_pl.data.schema import Split
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_facts, read_sample
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.data.store import INDEX, Store
from segvol_pl.errors import PackError
from segvol_pl.packing.stage import KEY_LENGTH, STAGING, Job, Staged, in_ascii, writing

SHARDS_AT_ONCE = 8
"""Shards written side by side."""


def drop_duplicates(staged: Sequence[Staged]) -> tuple[list[Staged], dict[str, str]]:
    """Keep the first of the cases that hold the same voxels. Return the kept ones, and left out -> kept."""
    first: dict[str, Staged] = {}
    for case in staged:
        first.setdefault(case.content_sha256, case)
    left_out = {case.id: first[case.content_sha256].id for case in staged if first[case.content_sha256] is not case}
    return list(first.values()), left_out


def join(kept: Sequence[Staged], out: Path, dataset: str, samples_per_shard: int) -> list[Path]:
    """Write the staged cases to shards and return these. The staging folder and the index are left to the caller.

    A shard holds one split only: a program that reads tars without the index cannot mix them up.

    Args:
        kept: The cases, in the order of their keys.
        out: The folder of the shards, which holds the staging folder.
        dataset: The shards' names start with it.
        samples_per_shard: Most samples in a shard.

    Raises:
        PackError: A shard cannot be written.
    """
    # A run that was killed while joining left shards, and parts of shards under temporary names.
    for stale in [*out.glob("*.tar"), *out.glob(".*.part")]:
        stale.unlink()
    shards: dict[Path, list[SampleRecord]] = {}
    stem = in_ascii(dataset)[:KEY_LENGTH]
    for split in Split:
        records = [case.record for case in kept if case.record.split == split.value]
        for first in range(0, len(records), samples_per_shard):
            name = f"{stem}-{split.value}-{first // samples_per_shard:05d}.tar"
            shards[out / name] = records[first : first + samples_per_shard]
    staging = Store(out / STAGING)

    def copy(path: Path) -> None:
        with writing(path):
            write_shard(path, (read_sample(staging, record) for record in shards[path]))

    # Copying waits for the disk: threads are enough.
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
        list(threads.map(copy, shards))
    return list(shards)


def take_apart(out: Path, by_key: dict[str, Job]) -> None:
    """Stage the samples of a finished folder again and remove its index.

    Args:
        out: The folder.
        by_key: The job of each of its samples.

    Raises:
        ShardError: A sample is damaged.
        PackError: The staging folder cannot be written, or a sample has an earlier encoding.
    """
    store = Store(out)
    samples = read_index(store).samples
    # Before anything is staged: what is staged is not encoded again.
    if any(read_facts(store, record).encoding != ENCODING for record in samples):
        raise PackError(f"out: {out} holds an earlier encoding: run segvol-pl repack {out}, then pack again")
    (out / STAGING).mkdir(exist_ok=True)
    for record in samples:
        path = by_key[record.key].path
        if not path.exists():
            with writing(path):
                write_shard(path, [read_sample(store, record)])
    (out / INDEX).unlink()
