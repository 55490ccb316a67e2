"""Shards in an earlier encoding into today's, in place (command `repack`).

1. `repack` finds the shards with a sample whose facts state an earlier encoding. Worker processes (`pool.py`) write
   each again into a staging folder within the folder of shards: HU are encoded again if LZ4HC is worth it, chunks are
   hashed again, and all else stays as it is.
2. A shard is written from samples whose every hash was checked, then read back and compared voxel by voxel. A shard
   with a damaged sample is left as it is.
3. When all are written, their index is written into the staging folder. Then the index of the folder is removed, the
   new shards are renamed over the old ones, and the new index is put in place.

Until the last step the folder is as it was, and can be read, at the cost of disk for a second copy of what is repacked.
During the last step, which takes milliseconds, it has no index: a reader gets an error, never an index that disagrees
with the shards. A run that was killed at any moment continues when it is started again: the staging folder is named by
the index that it was begun with, and an index in it means that the last step had begun.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from segvol_pl.atomic import atomic_path
from segvol_pl.config import RepackConfig
from segvol_pl.data.damage import DamagedSample
from segvol_pl.data.frames import CHUNK, ENCODING, decode_alone, encode_again
from segvol_pl.data.index_builder import sha256_of, walk_shard
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.data.schema import Facts, Member, Sample
from segvol_pl.data.shard_index import (
    ROWS,
    Index,
    Shard,
    load_index,
    remove_rows,
    size_problem,
    write_index,
)
from segvol_pl.data.shard_reader import arrays_of, read_array, read_facts, read_member
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.data.store import INDEX, Store
from segvol_pl.data.verify import sample_faults
from segvol_pl.errors import PackError, ShardError, StoreError
from segvol_pl.folder_lock import FolderLock
from segvol_pl.packing.pool import Work, run_jobs
from segvol_pl.packing.prepare import HU, sample_of
from segvol_pl.packing.report import REPORT, read_report
from segvol_pl.packing.stage import writing

STAGING = ".repack-"
"""The staging folder's name begins with it; the rest is a hash of the index that it was begun with."""
UNCHECKED = ".new"
"""Ends the name of a staged shard until it was read back."""


@dataclass(frozen=True)
class ShardJob:
    """One shard on its way to a worker."""

    folder: Path
    staging: Path
    shard: Shard
    records: SampleTable
    """Its samples, in its order."""

    @property
    def store(self) -> Store:
        """The folder. Without retries: report where a disk fails."""
        return Store(self.folder, retry_seconds=0.0)


@dataclass(frozen=True)
class Repacked:
    """The entries of the index for a shard that was written again."""

    shard: Shard
    records: SampleTable


@dataclass(frozen=True)
class RepackReport:
    """What became of the shards."""

    shards: int
    """Shards written again."""
    samples: int
    """Samples in them."""
    before: int
    """Their bytes before."""
    after: int
    """Their bytes now."""
    faults: list[str] = field(default_factory=list)
    """Why shards were left as they are: a line per damaged member."""


def repack(config: RepackConfig, console: Console | None = None) -> RepackReport:
    """Encode the shards of a local folder as `pack` does today, and return what was done.

    Samples, splits, their order and the training batches stay the same. Shards that have today's encoding, or a
    damaged sample, are left as they are.

    Args:
        config: The configuration.
        console: Shows progress and summary; by default nothing is shown.

    Raises:
        ShardError: The folder is not local, or has no usable index.
        LockedError: Another process writes to the folder, or it cannot be written.
        PackError: There is no room for the new shards, or they cannot be written.
    """
    console, folder = console or Console(quiet=True), Path(config.folder)
    if not Store(config.folder).local:
        raise ShardError(f"{config.folder} is not a local folder: run segvol-pl repack where the shards lie")
    if not folder.is_dir():
        raise ShardError(f"{folder} is not a folder: give the folder that holds the shards")
    with FolderLock(folder, against=".lock-*.json"):
        _finish_interrupted(folder)
        index = load_index(Store(folder))
        remove_rows(folder, index)  # a run that was killed after its last step left them
        if not all(sha256 for (sha256,) in index.samples.texts("facts_sha256")):
            raise ShardError(f"{folder / INDEX} has no hashes of the facts: run segvol-pl index {folder}")
        jobs = _jobs_of(folder, index)
        done, faults = _run(jobs, config.workers, console)
        if done:
            _swap(folder, _stage_index(jobs[0].staging, index, done))
            remove_rows(folder, load_index(Store(folder)))
        before = sum(job.shard.bytes for job in jobs if job.shard.name in done)
    samples, after = sum(len(each.records) for each in done.values()), sum(each.shard.bytes for each in done.values())
    report = RepackReport(len(done), samples, before, after, faults)
    _print_summary(report, folder, len(index.shards), console)
    return report


def _print_summary(report: RepackReport, folder: Path, shards: int, console: Console) -> None:
    if not report.shards and not report.faults:
        console.print(f"{folder}: all {shards} shards have today's encoding: nothing to do")
        return
    console.print(
        f"{folder}: {report.shards} of {shards} shards repacked ({report.samples} samples), "
        f"{report.before / 1e6:.1f} MB before, {report.after / 1e6:.1f} MB now"
    )


# What is to do


def _jobs_of(folder: Path, index: Index) -> list[ShardJob]:
    """Make the staging folder ready and return a job for each shard that has not today's encoding, or is damaged."""
    digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()[:16]
    staging = folder / f"{STAGING}{digest}"
    for stale in set(folder.glob(f"{STAGING}*")) - {staging}:
        shutil.rmtree(stale)
    # A write that was killed left a part.
    for part in [*staging.glob(f"*{UNCHECKED}"), *staging.glob(".*.part")]:
        part.unlink()
    records, none = index.samples.by_shard(), index.samples[:0]
    jobs = [ShardJob(folder, staging, shard, records.get(shard.name, none)) for shard in index.shards]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        current = list(threads.map(_is_current, jobs))
    return [job for job, done in zip(jobs, current, strict=True) if not done]


def _is_current(job: ShardJob) -> bool:
    try:
        return all(read_facts(job.store, record).encoding >= ENCODING for record in job.records)
    except (DamagedSample, StoreError):  # the job lists all that is wrong
        return False


def _check_room(jobs: list[ShardJob]) -> None:
    missing = [job for job in jobs if not (job.staging / job.shard.name).exists()]
    needed, free = sum(job.shard.bytes for job in missing), shutil.disk_usage(jobs[0].folder).free
    if free < needed:
        raise PackError(
            f"{jobs[0].folder}: repacking keeps the old shards until all new ones are complete: it needs about "
            f"{needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free: make room, then start again"
        )


def _run(jobs: list[ShardJob], workers: int, console: Console) -> tuple[dict[str, Repacked], list[str]]:
    """Do all jobs; return the shards written again, by name, and why others were not."""
    if not jobs:
        return {}, []
    _check_room(jobs)
    with writing(jobs[0].staging):
        jobs[0].staging.mkdir(exist_ok=True)
    done: dict[str, Repacked] = {}
    faults: list[str] = []
    work = Work(repack_shard, lambda job: job.shard.name, doing="repacking", job="shard", unit="shards")
    for job, outcome in run_jobs(work, jobs, workers, console):
        if isinstance(outcome, Repacked):
            done[job.shard.name] = outcome
        else:
            # It may have been staged by an earlier run, before it was damaged.
            (job.staging / job.shard.name).unlink(missing_ok=True)
            faults += outcome or [
                f"shard {job.folder / job.shard.name}: its worker was killed twice: memory is likely too small, use "
                "fewer workers="
            ]
    if not done:
        shutil.rmtree(jobs[0].staging)
    return done, sorted(faults)


# In a worker


def repack_shard(job: ShardJob) -> Repacked | list[str]:
    """Write a shard again into the staging folder, unless it is there already, and check it.

    Returns its entries of the index, or what is wrong with the shard, in lines. Raises PackError if it cannot be
    written, and ShardError if what was written is not what was read.
    """
    decode_alone()
    if faults := _faults_of(job):
        return faults
    staged = job.staging / job.shard.name
    records = _found_again(job, staged)
    if records is None:
        fresh = staged.with_name(staged.name + UNCHECKED)
        with writing(fresh):
            write_shard(fresh, _again(job))
            records = _checked(job, fresh)
            shutil.copymode(job.folder / job.shard.name, fresh)
            fresh.replace(staged)
    shard = replace(job.shard, bytes=staged.stat().st_size, sha256=sha256_of(staged))
    return Repacked(shard, SampleTable.of([replace(record, shard=shard.name) for record in records]))


def _faults_of(job: ShardJob) -> list[str]:
    if problem := size_problem(job.folder / job.shard.name, job.shard):
        return [problem]
    faults = [fault for record in job.records for fault in sample_faults(job.store, record)]
    return faults or [fault for record in job.records for fault in _unfit(job, record)]


def _unfit(job: ShardJob, record: SampleRecord) -> Iterator[str]:
    """What repacking would lose, or could not check: of tars that `pack` did not write."""
    place = f"shard {job.folder / job.shard.name}, sample {record.key}"
    hashes = read_facts(job.store, record).members
    for ending in record.members:
        if ending not in {member.value for member in Member}:
            yield f"{place}: holds {ending}, which would be lost: remove it from the tar, then run segvol-pl index"
        elif ending != Member.FACTS.value and not hashes.get(ending):
            yield f"{place}: {ending} has no hash, so damage would not be found: pack it with segvol-pl pack"


def _again(job: ShardJob) -> Iterator[Sample]:
    for record in job.records:
        facts = read_facts(job.store, record)
        frames = {
            member: encode_again(read_member(job.store, record, member, facts.members[member.value]), member in HU)
            for member in arrays_of(facts, record.members)
        }
        yield sample_of(facts, frames)


def _found_again(job: ShardJob, staged: Path) -> list[SampleRecord] | None:
    """The samples of a shard that an earlier run staged; None without one, or if it was damaged since."""
    try:
        return _checked(job, staged) if staged.exists() else None
    except (ShardError, StoreError):
        return None


def _checked(job: ShardJob, path: Path) -> list[SampleRecord]:
    """Read a shard back and return its samples. Raises ShardError unless they are the job's, voxel by voxel."""
    found, store = walk_shard(path), Store(path.parent, retry_seconds=0.0)
    if [record.key for record, _ in found] != [record.key for record in job.records]:
        raise ShardError(f"{path} does not hold the samples of {job.shard.name}: run segvol-pl repack again")
    for record, (new, facts) in zip(job.records, found, strict=True):
        before = read_facts(job.store, record)
        kept = replace(facts, members=before.members, chunks=before.chunks, encoding=before.encoding)
        same = kept == before and all(
            _same_voxels((job.store, record, before), (store, new, facts), member)
            for member in arrays_of(before, record.members)
        )
        if not same:
            raise ShardError(f"{path}, sample {record.key} differs from what was read: run segvol-pl repack again")
    return [record for record, _ in found]


def _same_voxels(
    before: tuple[Store, SampleRecord, Facts], after: tuple[Store, SampleRecord, Facts], member: Member
) -> bool:
    """Whether an array is the same in both, a few slices at a time. Raises DamagedSample."""
    store, record, facts = after
    read_member(store, record, member, facts.members[member.value])
    old, new = read_array(*before, member), read_array(*after, member)
    return old.dtype == new.dtype and all(
        np.array_equal(old[first : first + CHUNK[0]], new[first : first + CHUNK[0]])
        for first in range(0, old.shape[0], CHUNK[0])
    )


# The last step


def _stage_index(staging: Path, index: Index, done: dict[str, Repacked]) -> Path:
    """Write the new index into the staging folder, which makes it complete, and return that folder."""
    samples = {**index.samples.by_shard(), **{name: each.records for name, each in done.items()}}
    new = replace(
        index,
        shards=[done[shard.name].shard if shard.name in done else shard for shard in index.shards],
        samples=SampleTable.joined([samples[shard.name] for shard in index.shards if shard.name in samples]),
    )
    with writing(staging / INDEX):
        write_index(staging, new)
    for path in [*staging.glob(ROWS.format(digest="*")), staging / INDEX, staging]:
        _sync(path)
    return staging


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(folder: Path, staging: Path) -> None:
    """Put the staged shards in the place of the old ones, then the staged index. May be repeated after a kill."""
    index = load_index(Store(staging))
    (folder / INDEX).unlink(missing_ok=True)
    _sync(folder)
    for path in sorted(staging.glob("*.tar")):
        path.replace(folder / path.name)
    if (folder / REPORT).exists():
        # A report that cannot be read is not from `pack`: leave it.
        with suppress(PackError):
            replace(read_report(folder), bytes=sum(shard.bytes for shard in index.shards)).write(folder)
    # Copied: the staged index needs its rows if this is repeated.
    for rows in staging.glob(ROWS.format(digest="*")):
        with atomic_path(folder / rows.name) as part:
            shutil.copyfile(rows, part)
            _sync(part)
    _sync(folder)
    (staging / INDEX).replace(folder / INDEX)
    shutil.rmtree(staging)


def _finish_interrupted(folder: Path) -> None:
    """Finish the last step of a run that was killed in it."""
    if not (folder / INDEX).exists():
        for index in folder.glob(f"{STAGING}*/{INDEX}"):
            _swap(folder, index.parent)
