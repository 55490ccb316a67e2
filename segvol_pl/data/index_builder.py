"""Build the index of a folder of shards (command `index`): walk its tars once, write `index.json`; see `shard_index`.

1. `walk_shard` reads the facts of every sample of one tar, and where its members lie.
2. `build_index` does so for all tars of a folder in parallel, checks that their samples fit together, and writes the
   index.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from segvol_pl.data.sample_table import SampleRecord, SampleTable, check_key
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.shard_index import Category, Index, Shard, remedy, write_index
from segvol_pl.data.shard_reader import parse_facts
from segvol_pl.data.store import INDEX, ShardSource
from segvol_pl.errors import ShardError

TAR_END = 1024
"""Bytes: a complete tar ends in two empty records of 512 bytes."""


def build_index(folder: ShardSource) -> Index:
    """Walk every tar of a local folder, write `index.json` there and return it.

    Raises:
        ShardError: there is no tar, a tar is truncated, a sample lacks a member, or two samples share a key.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ShardError(f"{root} is not a folder: give the folder that holds the shards")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise ShardError(f"{root} holds no *.tar: pack data into it with segvol-pl pack")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        index = _summarise(root, list(threads.map(_summary_of, paths)))
    write_index(root, index)
    return index


def walk_shard(path: Path) -> list[tuple[SampleRecord, Facts]]:
    """Record and facts of every sample of a tar, in its order. Raises ShardError for a damaged tar."""
    _check_end(path)
    try:
        with tarfile.open(path, "r:") as tar:
            return [_read_record(path, tar, key, members) for key, members in _group_members(tar)]
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"shard {path} cannot be read ({error}): copy or pack it again") from error


def _check_end(path: Path) -> None:
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - TAR_END, 0))
        if stream.read() != b"\0" * TAR_END:
            raise ShardError(f"shard {path} is truncated (it does not end as a tar does): copy or pack it again")


def _group_members(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    key, members = "", dict[str, tarfile.TarInfo]()
    for entry in tar:
        if not entry.isreg():
            raise tarfile.ReadError(f"{entry.name!r} is not a file")
        stem, _, ending = entry.name.partition(".")
        if stem != key and members:
            yield key, members
            members = {}
        key = stem
        members[ending] = entry
    if members:
        yield key, members


def _read_record(
    path: Path, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]
) -> tuple[SampleRecord, Facts]:
    check_key(key, f"shard {path}")
    stream = tar.extractfile(members[Member.FACTS.value]) if Member.FACTS.value in members else None
    if stream is None:
        raise ShardError(f"shard {path}, sample {key}: has no {Member.FACTS.value}: pack it again")
    text = stream.read()
    facts = parse_facts(text, f"shard {path}, sample {key}")
    missing = sorted(set(facts.members) - set(members))
    if missing:
        raise ShardError(f"shard {path}, sample {key}: lacks {', '.join(missing)}: copy or pack it again")
    record = SampleRecord(
        key=key,
        shard=path.name,
        split=facts.split,
        labelled=facts.labelled,
        shape=facts.shape,
        spacing=facts.spacing,
        categories=sorted(facts.categories),
        members={ending: [entry.offset_data, entry.size] for ending, entry in members.items()},
        content=facts.source.get("content_sha256", ""),
        facts_sha256=hashlib.sha256(text).hexdigest(),
    )
    return record, facts


@dataclass(frozen=True)
class ShardSummary:
    """What the index keeps of one shard. Its facts would take ten times the memory of the index."""

    shard: Shard
    samples: SampleTable
    datasets: set[str]
    overview_shapes: set[tuple[int, ...]]
    categories: dict[str, Category]


def _summary_of(path: Path) -> ShardSummary:
    pairs = walk_shard(path)
    facts = [fact for _, fact in pairs]
    return ShardSummary(
        shard=Shard(path.name, path.stat().st_size, sha256_of(path), len(pairs)),
        samples=SampleTable.of([record for record, _ in pairs]),
        datasets={fact.dataset for fact in facts},
        overview_shapes={tuple(fact.overview_shape) for fact in facts},
        categories=_count_categories(facts),
    )


def _count_categories(facts: list[Facts]) -> dict[str, Category]:
    each = ((name, Category(held.values, 1, held.voxels)) for fact in facts for name, held in fact.categories.items())
    return _added(each)


def _added(categories: Iterable[tuple[str, Category]]) -> dict[str, Category]:
    by_name: dict[str, list[Category]] = {}
    for name, category in categories:
        by_name.setdefault(name, []).append(category)
    return {
        name: Category(
            values=sorted({value for category in found for value in category.values}),
            cases=sum(category.cases for category in found),
            voxels=sum(category.voxels for category in found),
        )
        for name, found in sorted(by_name.items())
    }


def _summarise(root: Path, found: list[ShardSummary]) -> Index:
    shapes = sorted({shape for one in found for shape in one.overview_shapes})
    samples = SampleTable.joined([one.samples for one in found])
    samples.check({one.shard.name: one.shard.bytes for one in found}, str(root), remedy(str(root / INDEX)))
    if len(shapes) != 1:
        raise ShardError(f"{root} mixes overviews of shapes {shapes}: pack them into separate folders")
    return Index(
        dataset="+".join(sorted({name for one in found for name in one.datasets})),
        overview_shape=list(shapes[0]),
        shards=[one.shard for one in found],
        splits=samples.per_split(),
        categories=_added(pair for one in found for pair in one.categories.items()),
        samples=samples,
    )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
