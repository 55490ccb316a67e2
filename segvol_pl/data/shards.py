"""Shards: ordinary WebDataset tars with an index beside them, so that a sample is a ranged read.

1. `write_shard` puts samples into a tar; their arrays are Blosc2 frames, see `frames`.
2. `build_index` (verb `index`) walks the tars of a folder once and writes `index.json`: where every member lies.
3. `read_index` gives it back and refuses what is missing or truncated; `read_member`, `read_facts` and `read_array`
   read by range, of large arrays the chunks that a slice touches, and check the hashes taken at packing.
4. `verify` (verb `verify`) recomputes every hash and decodes every array; `describe` (verb `inspect`) lists samples.

The format is promised in shards/README.md. Nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import IO, Any

import numpy as np
import webdataset

from segvol_pl.atomic import atomic_path, write_text
from segvol_pl.data.frames import CHUNK, Form, PartialFrame, Span, WholeFrame, decode_alone
from segvol_pl.data.schema import SCHEMA, CategoryFacts, Facts, Member
from segvol_pl.data.store import INDEX as INDEX
from segvol_pl.data.store import Source, Store
from segvol_pl.errors import SampleError, ShardError, StoreError
from segvol_pl.imaging.transforms import Sliceable

KEY = re.compile(r"[A-Za-z0-9_-]+")
"""What a sample is called. Files are named after it: it holds no dot and no slash."""

DTYPES = {
    Member.CT: ("int16",),
    Member.LABEL: ("uint8", "uint16"),
    Member.OVERVIEW: ("int16",),
    Member.OVERVIEW_LABEL: ("uint8", "uint16"),
    Member.REGIONS: ("uint16",),
}
"""What the arrays of a sample hold."""
ON_OVERVIEW = {Member.OVERVIEW, Member.OVERVIEW_LABEL, Member.REGIONS}
"""Arrays on the overview's grid; the others are on the volume's."""

TAR_END = 1024
"""A tar ends in two empty records of 512 bytes; without them it was cut off."""


class Damage(Enum):
    """What is wrong with a sample's bytes."""

    MISSING = "missing"  # the shard, or the member, is not there
    SHORT = "short"  # the shard ends before the member does
    ALTERED = "altered"  # the bytes are not those that were packed
    UNREADABLE = "unreadable"  # the bytes are no facts and no array


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

    def check_kinds(self) -> None:
        """Raises TypeError for a value that is not what it is declared to be."""
        _require_shape(self.shape, f"shape of sample {self.key}")
        for text in (self.shard, self.split, self.content, self.facts_sha256):
            _require_kind(text, str, f"sample {self.key}")
        for ending, place in self.members.items():
            for number in place:
                _require_kind(number, int, f"place of {ending} of sample {self.key}")


def _require_kind(value: object, kind: type, name: str) -> None:
    # A bool is no number here.
    if type(value) is not kind:
        raise TypeError(f"{name}: {value!r} is no {kind.__name__}")


def _require_shape(shape: object, name: str) -> None:
    if not isinstance(shape, list) or len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise TypeError(f"{name}: {shape!r} is no shape of three axes")


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
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ShardError(f"{place} is no index of shards ({error}): {_remedy(place)}") from error

    def _check(self, place: str) -> None:
        """An index is data from elsewhere: what it names lies within its shards, once. Raises ShardError."""
        sizes: dict[str, int] = {}
        for shard in self.shards:
            _require_kind(shard.bytes, int, f"bytes of shard {shard.name}")
            if shard.name in sizes:
                raise ShardError(f"{place}: lists shard {shard.name} twice: {_remedy(place)}")
            sizes[shard.name] = shard.bytes
        _require_shape(self.overview_shape, "overview_shape")
        _check_keys(self.samples, place)
        for record in self.samples:
            _check_key(record.key, place)
            record.check_kinds()
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
    with atomic_path(path) as part, part.open("wb") as stream:
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
        facts = Facts.from_dict(json.loads(text))
        _require_shape(facts.shape, "shape")
        _require_shape(facts.overview_shape, "overview_shape")
        for ending, sha256 in facts.members.items():
            _require_kind(sha256, str, f"hash of {Member(ending).value}")
        for name, held in facts.categories.items():
            _require_voxels(held, facts.shape, name)
        return facts
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedSample(f"{place}: {error}", Damage.UNREADABLE) from error


def _require_voxels(held: CategoryFacts, shape: list[int], name: str) -> None:
    anchors_N3 = np.array(held.anchors)
    voxels = anchors_N3.ndim == 2 and anchors_N3.shape[1] == 3 and anchors_N3.dtype.kind == "i"
    if not voxels or (anchors_N3 < 0).any() or (anchors_N3 >= shape).any():
        raise TypeError(f"anchors of {name} are no voxels of {shape}")
    if not isinstance(held.values, list) or not all(type(value) is int for value in held.values):
        raise TypeError(f"values of {name} are no list of whole numbers")


def _summarise(found: list[tuple[Path, list[tuple[SampleRecord, Facts]]]], hashes: list[str]) -> Index:
    pairs = [pair for _, samples in found for pair in samples]
    records, facts = [record for record, _ in pairs], [fact for _, fact in pairs]
    _check_keys(records, str(found[0][0].parent))
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


def _check_keys(records: list[SampleRecord], place: str) -> None:
    seen: dict[str, str] = {}
    for record in records:
        if record.key in seen:
            raise ShardError(
                f"{place}: sample {record.key} stands in {seen[record.key]} and in {record.shard}: remove one of them"
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
        # Past the cache: one that cannot be written has forgotten nothing.
        parts = _read_spans(replace(store, cache=None), record, member, spans, sha256)
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
    except FileNotFoundError as error:
        raise DamagedSample(f"{place} cannot be read ({error})", Damage.MISSING) from error
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
    if facts.shape != record.shape:
        raise DamagedSample(
            f"shard {place}, sample {record.key}: is of {facts.shape}, the index says {record.shape}: {_remedy(place)}",
            Damage.ALTERED,
        )
    return facts


def read_array(store: Store, record: SampleRecord, facts: Facts, member: Member) -> Sliceable:
    """One member as an array, still encoded, its bytes being those that were packed.

    Raises DamagedSample, here or where it is sliced.
    """
    sha256, table = facts.members.get(member.value, ""), facts.chunks.get(member.value)
    place = _name(store, record, member)
    if table is None:
        return _opened(read_member(store, record, member, sha256), facts, member, place)
    if record.members.get(member.value, (0, 0))[1] != table.bytes:
        raise _altered(place)
    with _blamed(place):
        partial = PartialFrame(
            table,
            lambda spans, sound: _read_parts(store, record, member, spans, sound, sha256),
            _form(facts, member),
        )
    return _Blamed(partial, place)


def array_of(content: bytes, facts: Facts, member: Member, place: str) -> Sliceable:
    """The array in a member's bytes, still encoded.

    Raises DamagedSample where they are not what was packed, here or where it is sliced.
    """
    if not _is_sound(content, facts.members.get(member.value, "")):
        raise _altered(place)
    return _opened(content, facts, member, place)


def arrays_of(facts: Facts, stored: Collection[str]) -> list[Member]:
    """The arrays that a sample has: those that its facts name, and others among the endings of what is `stored`."""
    return [member for member in DTYPES if member.value in facts.members or member.value in stored]


def _opened(content: bytes, facts: Facts, member: Member, place: str) -> Sliceable:
    with _blamed(place):
        return _Blamed(WholeFrame(content, _form(facts, member)), place)


def _form(facts: Facts, member: Member) -> Form:
    return Form(tuple(facts.overview_shape if member in ON_OVERVIEW else facts.shape), DTYPES[member])


class _Blamed:
    """An array of which what cannot be decoded is damage of its sample."""

    def __init__(self, array: Sliceable, place: str) -> None:
        self._array, self._place = array, place

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> Any:
        with _blamed(self._place):
            return self._array.dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        with _blamed(self._place):
            return self._array[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Without it numpy takes the whole for one object.
        return np.array(self[:], dtype)


@contextmanager
def _blamed(place: str) -> Iterator[None]:
    try:
        yield
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
    """The faults of a local folder of shards, one line each: sizes, the sha256 of shards and of members, decoding.

    Each line names the shard, the sample and the byte at which the member starts. Shards are read in parallel. An
    empty list means that every byte is as it was packed, or, of shards without hashes, that every array can be decoded
    and is of the stated shape and dtype. Raises ShardError where there is no index.
    """
    # A check does not wait for a disk that fails: it says where.
    store = Store(folder, retry_seconds=0.0)
    if not store.local:
        raise ShardError(f"{folder} is no local folder: run segvol-pl verify where the shards lie")
    index = load_index(store)
    records: dict[str, list[SampleRecord]] = {shard.name: [] for shard in index.shards}
    for record in index.samples:
        records[record.shard].append(record)
    decode_alone()
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
    """Decodes every chunk of an array as a loader does, a few at a time. Raises DamagedSample, StoreError."""
    if member.value in facts.chunks:
        # Read in parts, it is held against the hashes of its chunks alone.
        read_member(store, record, member, facts.members.get(member.value, ""))
    array = read_array(store, record, facts, member)
    for start in range(0, array.shape[0], CHUNK[0]):
        array[start : start + CHUNK[0]]


def _at(error: DamagedSample | StoreError, record: SampleRecord, member: Member) -> str:
    offset, size = record.members.get(member.value, (0, 0))
    cause = error.damage.value if isinstance(error, DamagedSample) else "not read"
    return f"{error} [{cause}, bytes {offset} to {offset + size} of {record.shard}]"


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
