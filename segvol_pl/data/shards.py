"""Shards: ordinary WebDataset tars with an index beside them, so that a sample is a ranged read.

1. `write_shard` puts samples into a tar; their arrays are Blosc2 frames, see `frames`.
2. `build_index` (verb `index`) walks the tars of a folder once and writes `index.json`: where every member lies.
3. `read_index` gives it back and refuses what is missing or truncated; `read_member`, `read_facts` and `read_array`
   read by range, of large arrays the chunks that a slice touches, and check the hashes taken at packing.
4. `verify` (verb `verify`) recomputes every hash; `describe` (verb `inspect`) lists the samples.

The format is promised in shards/README.md. Nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

import webdataset

from segvol_pl.data.frames import PartialFrame, Span, decode_array
from segvol_pl.data.sample import SCHEMA, CategoryFacts, Facts, Member, SampleError
from segvol_pl.data.store import Source, Store
from segvol_pl.data.transforms import Sliceable
from segvol_pl.data.whole import replacing, write_text

INDEX = "index.json"

KEY = re.compile(r"[A-Za-z0-9_-]+")
"""What a sample is called. Files are named after it: it holds no dot and no slash."""

TAR_END = 1024
"""A tar ends in two empty records of 512 bytes; without them it was cut off."""


class ShardError(ValueError):
    """A folder of shards that cannot be used. The message names the shard and key, and the remedy."""


class Damage(Enum):
    """What is wrong with a sample's bytes."""

    MISSING = "missing"  # the shard, or the member, is not there
    SHORT = "short"  # the shard ends before the member does
    ALTERED = "altered"  # the bytes are not those that were packed
    UNREADABLE = "unreadable"  # the disk gives an error, or the bytes are no facts and no array


class DamagedSample(ShardError):
    """One sample that cannot be used, though its folder can; `damage` says why."""

    def __init__(self, message: str, damage: Damage) -> None:
        super().__init__(message)
        self.damage = damage


@dataclass(frozen=True)
class Sample:
    """One sample, encoded: what `write_shard` writes."""

    key: str
    members: dict[Member, bytes]


@dataclass(frozen=True)
class Shard:
    """One tar of a folder."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Category:
    """One category over a whole folder."""

    values: list[int]
    cases: int
    voxels: int


@dataclass(frozen=True)
class SampleRecord:
    """Where one sample lies, and what a loader must know before it reads."""

    key: str
    shard: str
    split: str
    labelled: bool
    shape: list[int]
    """(D,H,W) of the packed volume."""
    spacing: list[float] | None
    """mm along d, h, w. None: unknown."""
    categories: list[str]
    """Names of the categories present, sorted."""
    members: dict[str, list[int]]
    """Member ending -> [offset, size] in the shard, bytes."""
    content: str = ""
    """sha256 of the voxels. Empty in an index written before it held them."""
    facts_sha256: str = ""
    """sha256 of the facts' bytes, which hold the hashes of the other members. Empty likewise."""


@dataclass(frozen=True)
class Index:
    """`index.json`: everything that is known of a folder of shards without opening one."""

    dataset: str
    overview_shape: list[int]
    shards: list[Shard]
    splits: dict[str, int]
    """Split -> samples."""
    categories: dict[str, Category]
    samples: list[SampleRecord]
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The bytes of `index.json`: the same index gives the same."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, place: str) -> Index:
        """Raises ShardError, naming `place`, for another schema or a file that is no index."""
        try:
            raw = json.loads(text)
            if raw["schema"] != SCHEMA:
                raise ShardError(
                    f"{place}: schema {raw['schema']} but this version reads {SCHEMA}: pack the data again"
                )
            parts = {
                "shards": [Shard(**shard) for shard in raw["shards"]],
                "categories": {name: Category(**facts) for name, facts in raw["categories"].items()},
                "samples": [SampleRecord(**record) for record in raw["samples"]],
            }
            index = cls(**{**raw, **parts})
            index._check(place)
            return index
        except ShardError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(f"{place} is no index of shards ({error}): {_remedy(place)}") from error

    def _check(self, place: str) -> None:
        """An index is data from elsewhere: what it names lies within its shards. Raises ShardError."""
        sizes = {shard.name: shard.bytes for shard in self.shards}
        for record in self.samples:
            _check_key(record.key, place)
            if record.shard not in sizes:
                raise ShardError(f"{place}: sample {record.key} is in no shard that it lists: {_remedy(place)}")
            for ending, (offset, size) in record.members.items():
                if not (0 <= offset <= offset + size <= sizes[record.shard]):
                    raise ShardError(
                        f"{place}: sample {record.key}: {ending} lies outside {record.shard}: {_remedy(place)}"
                    )


# Writing


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """A tar of the samples, members in the order of `Member`; equal samples give equal bytes.

    Written under a temporary name in the same folder, then renamed.
    """
    with replacing(path) as part, part.open("wb") as stream:
        _write_tar(stream, samples)
        stream.flush()
        os.fsync(stream.fileno())


def _write_tar(stream: IO[bytes], samples: Iterable[Sample]) -> None:
    fixed = {"user": "segvol_pl", "group": "segvol_pl", "mode": 0o644, "mtime": 0}
    with webdataset.TarWriter(stream, encoder=False, **fixed) as writer:
        for sample in samples:
            for member in Member:
                # The writer sorts the members of one call by name; one call each keeps the order of `Member`.
                if member in sample.members:
                    writer.write({"__key__": sample.key, member.value: sample.members[member]})


# Indexing


def build_index(folder: Source) -> Index:
    """Walks every tar of a local folder, writes `index.json` there and returns it (verb `index`).

    Raises ShardError where there is no tar, a tar is truncated, a sample lacks a member, or two samples share a key.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ShardError(f"{root} is no folder: give the folder that holds the shards")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise ShardError(f"{root} holds no *.tar: pack data into it with segvol-pl pack")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = list(zip(paths, threads.map(walk_shard, paths), strict=True))
        hashes = list(threads.map(sha256_of, paths))
    index = _summarise(found, hashes)
    write_text(root / INDEX, index.to_json() + "\n")
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
            raise tarfile.ReadError(f"{entry.name!r} is no file")
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
    _check_key(key, f"shard {path}")
    stream = tar.extractfile(members[Member.FACTS.value]) if Member.FACTS.value in members else None
    if stream is None:
        raise ShardError(f"shard {path}, sample {key}: has no {Member.FACTS.value}: pack it again")
    text = stream.read()
    facts = _parse_facts(text, f"shard {path}, sample {key}")
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


def _check_key(key: str, place: str) -> None:
    if not KEY.fullmatch(key):
        raise ShardError(f"{place}: {key!r} names no sample (letters, digits, _ and -): pack the data again")


def _parse_facts(text: bytes, place: str) -> Facts:
    try:
        return Facts.from_dict(json.loads(text))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, SampleError) as error:
        raise DamagedSample(f"{place}: {error}", Damage.UNREADABLE) from error


def _summarise(found: list[tuple[Path, list[tuple[SampleRecord, Facts]]]], hashes: list[str]) -> Index:
    pairs = [pair for _, samples in found for pair in samples]
    records, facts = [record for record, _ in pairs], [fact for _, fact in pairs]
    _check_keys(records)
    shapes = sorted({tuple(fact.overview_shape) for fact in facts})
    if len(shapes) != 1:
        raise ShardError(f"{found[0][0].parent} mixes overviews of shape {shapes}: pack them into folders of their own")
    splits = [record.split for record in records]
    return Index(
        dataset="+".join(sorted({fact.dataset for fact in facts})),
        overview_shape=list(shapes[0]),
        shards=[
            Shard(path.name, path.stat().st_size, sha256, len(samples))
            for (path, samples), sha256 in zip(found, hashes, strict=True)
        ],
        splits={split: splits.count(split) for split in sorted(set(splits))},
        categories=_count_categories(facts),
        samples=records,
    )


def _check_keys(records: list[SampleRecord]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record.key in seen:
            raise ShardError(
                f"sample {record.key} stands in {seen[record.key]} and in {record.shard}: remove one of them"
            )
        seen[record.key] = record.shard


def _count_categories(facts: list[Facts]) -> dict[str, Category]:
    by_name: dict[str, list[CategoryFacts]] = {}
    for fact in facts:
        for name, category in fact.categories.items():
            by_name.setdefault(name, []).append(category)
    return {
        name: Category(
            values=sorted({value for category in found for value in category.values}),
            cases=len(found),
            voxels=sum(category.voxels for category in found),
        )
        for name, found in sorted(by_name.items())
    }


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Reading


def read_index(store: Store) -> Index:
    """The index of a folder of shards.

    Raises ShardError where it is missing, of another schema, or (in a local folder) names a shard that is missing
    or has another size. Shards elsewhere are not asked for their sizes: a short read tells.
    """
    index = load_index(store)
    for problem in size_problems(store, index).values():
        raise ShardError(problem)
    return index


def size_problems(store: Store, index: Index) -> dict[str, str]:
    """Shard -> what is wrong with its size, in words; a local folder's alone."""
    if not store.local:
        return {}
    found = {shard.name: _size_problem(Path(store.place(shard.name)), shard) for shard in index.shards}
    return {name: problem for name, problem in found.items() if problem}


def load_index(store: Store) -> Index:
    """The index as it stands, shards not looked at. Raises ShardError where there is none; StoreError, see `store`."""
    place = store.place(INDEX)
    try:
        text = store.file(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{place} does not exist: {_remedy(place)}") from None
    except OSError as error:
        raise ShardError(f"{place} cannot be read ({error})") from error
    return Index.from_json(text.decode("utf-8", errors="replace"), place)


def _size_problem(path: Path, shard: Shard) -> str:
    """What is wrong with a shard's size, in words; empty where nothing is."""
    if not path.is_file():
        return f"shard {path} is missing though the index names it: copy it there, or {_remedy(str(path))}"
    size = path.stat().st_size
    if size == shard.bytes:
        return ""
    fault = "is truncated" if size < shard.bytes else "is not the one indexed"
    return f"shard {path} {fault} ({size} bytes, the index says {shard.bytes}): copy or pack it again"


def read_member(store: Store, record: SampleRecord, member: Member, sha256: str = "") -> bytes:
    """The bytes of one member, by one ranged read, held against their `sha256` where it is given.

    Raises DamagedSample, naming shard and key, where they are not whole; StoreError, see `store`.
    """
    size = record.members.get(member.value, (0, 0))[1]
    return _read_parts(store, record, member, [(0, size)], lambda parts: _is_sound(parts[0], sha256), sha256)[0]


def _read_parts(
    store: Store,
    record: SampleRecord,
    member: Member,
    spans: list[Span],
    sound: Callable[[list[bytes]], bool],
    sha256: str,
) -> list[bytes]:
    """The spans of a member; what a cache holds damaged is fetched anew, once."""
    parts = _read_spans(store, record, member, spans, sha256)
    if sound(parts):
        return parts
    if store.cache is not None:
        store.cache.forget(sha256)
        parts = _read_spans(store, record, member, spans, sha256)
        if sound(parts):
            return parts
    raise _altered(_name(store, record, member))


def _read_spans(store: Store, record: SampleRecord, member: Member, spans: list[Span], sha256: str) -> list[bytes]:
    place = _name(store, record, member)
    if member.value not in record.members:
        raise DamagedSample(f"{place} is not there", Damage.MISSING)
    offset, size = record.members[member.value]
    try:
        parts = store.member(record.shard, offset, size, spans, sha256)
    except OSError as error:
        damage = Damage.MISSING if isinstance(error, FileNotFoundError) else Damage.UNREADABLE
        raise DamagedSample(f"{place} cannot be read ({error})", damage) from error
    got, asked = sum(map(len, parts)), sum(last - first for first, last in spans)
    if got != asked:
        raise DamagedSample(f"{place} gave {got} of {asked} bytes: the shard is truncated, copy it again", Damage.SHORT)
    return parts


def read_sample(store: Store, record: SampleRecord) -> Sample:
    """All members of one sample, checked. Raises as `read_member`."""
    hashes = {**read_facts(store, record).members, Member.FACTS.value: record.facts_sha256}
    members = [member for member in Member if member.value in record.members]
    return Sample(record.key, {one: read_member(store, record, one, hashes.get(one.value, "")) for one in members})


def read_facts(store: Store, record: SampleRecord) -> Facts:
    """The facts of one sample. Raises DamagedSample for bytes that are not this sample's."""
    text = read_member(store, record, Member.FACTS, record.facts_sha256)
    return facts_of(text, record, store.place(record.shard))


def facts_of(text: bytes, record: SampleRecord, place: str) -> Facts:
    """The facts in a member's bytes. Raises DamagedSample for those of another sample, or for none."""
    facts = _parse_facts(text, f"shard {place}, sample {record.key}")
    if facts.key != record.key:
        raise DamagedSample(
            f"shard {place}, sample {record.key}: holds the facts of {facts.key}: {_remedy(place)}", Damage.ALTERED
        )
    return facts


def read_array(store: Store, record: SampleRecord, facts: Facts, member: Member) -> Sliceable:
    """One member as an array, still encoded, its bytes being those that were packed.

    Raises DamagedSample, here or, for a large member that is read in parts, where it is sliced.
    """
    sha256, table = facts.members.get(member.value, ""), facts.chunks.get(member.value)
    if table is None:
        return array_of(read_member(store, record, member, sha256), "", _name(store, record, member))
    if record.members.get(member.value, (0, 0))[1] != table.bytes:
        raise _altered(_name(store, record, member))
    return PartialFrame(table, lambda spans, sound: _read_parts(store, record, member, spans, sound, sha256))


def array_of(content: bytes, sha256: str, place: str) -> Sliceable:
    """The array in a member's bytes. Raises DamagedSample where they are not what was packed, or no array."""
    if not _is_sound(content, sha256):
        raise _altered(place)
    try:
        return decode_array(content)
    except SampleError as error:
        raise DamagedSample(f"{place}: {error}", Damage.UNREADABLE) from error


def _is_sound(content: bytes, sha256: str) -> bool:
    """`sha256` is empty where a tar was not packed here: then there is nothing to compare with."""
    return not sha256 or hashlib.sha256(content).hexdigest() == sha256


def _altered(place: str) -> DamagedSample:
    return DamagedSample(f"{place} is not what was packed: copy or pack the shard again", Damage.ALTERED)


def _name(store: Store, record: SampleRecord, member: Member) -> str:
    return f"shard {store.place(record.shard)}, sample {record.key}: {member.value}"


def _remedy(place: str) -> str:
    return f"run segvol-pl index {place.rpartition('/')[0] or '.'}"


# Checking and listing


def verify(folder: Source) -> list[str]:
    """The faults of a local folder of shards, one line each: sizes, and the sha256 of shards and of members.

    Each line names the shard, the sample and the byte at which the member starts. Shards are read in parallel. An
    empty list means that every byte is as it was packed. Raises ShardError where there is no index.
    """
    store = Store(folder)
    if not store.local:
        raise ShardError(f"{folder} is no local folder: run segvol-pl verify where the shards lie")
    index = load_index(store)
    records: dict[str, list[SampleRecord]] = {shard.name: [] for shard in index.shards}
    for record in index.samples:
        records[record.shard].append(record)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = threads.map(lambda shard: _faults_of(store, shard, records[shard.name]), index.shards)
        return [fault for faults in found for fault in faults]


def _faults_of(store: Store, shard: Shard, records: list[SampleRecord]) -> list[str]:
    path = Path(store.place(shard.name))
    if problem := _size_problem(path, shard):
        return [problem]
    faults = [fault for record in records for fault in _sample_faults(store, record)]
    if not faults and sha256_of(path) != shard.sha256:
        return [f"shard {path}: its sha256 is not the indexed one, though all samples are sound: copy it again"]
    return faults


def _sample_faults(store: Store, record: SampleRecord) -> list[str]:
    """Faults that a re-indexed shard would hide: the facts hold the hashes taken at packing."""
    try:
        facts = read_facts(store, record)
    except DamagedSample as error:
        return [_at(error, record, Member.FACTS.value)]
    faults = []
    for ending, sha256 in facts.members.items():
        try:
            member = Member(ending)
            array_of(read_member(store, record, member, sha256), "", _name(store, record, member))
        except DamagedSample as error:
            faults.append(_at(error, record, ending))
    return faults


def _at(error: DamagedSample, record: SampleRecord, ending: str) -> str:
    offset, size = record.members.get(ending, (0, 0))
    return f"{error} [{error.damage.value}, bytes {offset} to {offset + size} of {record.shard}]"


def describe(folder: Source) -> list[dict[str, Any]]:
    """One row a sample, for the verb `inspect`: key, split, shape, spacing (mm), categories, bytes, shard."""
    return [
        {
            "key": record.key,
            "split": record.split,
            "shape": tuple(record.shape),
            "spacing": tuple(round(step, 3) for step in record.spacing) if record.spacing else "unknown",
            "categories": record.categories,
            "bytes": sum(size for _, size in record.members.values()),
            "shard": record.shard,
        }
        for record in read_index(Store(folder)).samples
    ]
