"""Read samples from shards by byte range, and check them against the hashes taken at packing.

1. `read_facts` reads what is known of a sample; `read_slices` then reads slices of several of its arrays together, and
   `read_array` opens one of them. Of a large array only the chunks that a slice touches are read. `read_member` and
   `read_sample` give the bytes as they are.
2. `facts_of` and `array_of` do the same with bytes that are already here (`pipe`).
3. Bytes that are missing, too few, altered or undecodable raise `DamagedSample`, which names shard, sample and member.

Nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from segvol_pl.data.cache import MemberParts
from segvol_pl.data.damage import Damage, DamagedSample
from segvol_pl.data.frames import ByteRange, Form, PartialFrame, Slices, WholeFrame
from segvol_pl.data.sample_table import SampleRecord, require_kind, require_shape
from segvol_pl.data.schema import CategoryFacts, Facts, Member, Sample
from segvol_pl.data.shard_index import remedy
from segvol_pl.data.store import Store
from segvol_pl.errors import SampleError
from segvol_pl.imaging.transforms import Sliceable

DTYPES = {
    Member.CT: ("int16",),
    Member.LABEL: ("uint8", "uint16"),
    Member.OVERVIEW: ("int16",),
    Member.OVERVIEW_LABEL: ("uint8", "uint16"),
    Member.REGIONS: ("uint16",),
}
"""dtypes of a sample's arrays."""


ON_OVERVIEW = {Member.OVERVIEW, Member.OVERVIEW_LABEL, Member.REGIONS}
"""Arrays on the overview's grid; the others are on the volume's grid."""


def parse_facts(text: bytes, place: str) -> Facts:
    """Decode the facts of a sample. Raises DamagedSample, naming `place`, if the bytes are not facts."""
    try:
        facts = Facts.from_dict(json.loads(text))
        require_shape(facts.shape, "shape")
        require_shape(facts.overview_shape, "overview_shape")
        require_kind(facts.encoding, int, "encoding")
        for ending, sha256 in facts.members.items():
            require_kind(sha256, str, f"hash of {Member(ending).value}")
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


def read_member(store: Store, record: SampleRecord, member: Member, sha256: str = "") -> bytes:
    """Read the bytes of one member in one ranged read.

    Args:
        store: the folder.
        record: the sample.
        member: which of its members.
        sha256: what the bytes must hash to; empty: do not check.

    Raises:
        DamagedSample: the bytes are missing, too few or altered.
        StoreError: the store cannot be read.
    """
    size = record.members.get(member.value, (0, 0))[1]
    return _read_checked(store, record, [_complete(member, size, sha256)])[0][0]


@dataclass(frozen=True)
class _Request:
    """Parts of one member, and a check that they are what was packed."""

    member: Member
    spans: list[ByteRange]
    sound: Callable[[list[bytes]], bool]
    sha256: str
    """Of the complete member: its name in the cache."""


def _complete(member: Member, size: int, sha256: str) -> _Request:
    return _Request(member, [(0, size)], lambda parts: _is_sound(parts[0], sha256), sha256)


def _read_checked(store: Store, record: SampleRecord, requests: Sequence[_Request]) -> list[list[bytes]]:
    """Read the parts of all requests together. If a cached copy is damaged, read it once more without the cache."""
    found = _read_parts(store, record, requests)
    for number, request in enumerate(requests):
        if request.sound(found[number]):
            continue
        if store.cache is not None:
            store.cache.forget(request.sha256)
            # Without the cache: one that is not writable still holds the damaged copy.
            (found[number],) = _read_parts(replace(store, cache=None), record, [request])
        if store.cache is None or not request.sound(found[number]):
            raise _altered(_place(store, record, request.member))
    return found


def _read_parts(store: Store, record: SampleRecord, requests: Sequence[_Request]) -> list[list[bytes]]:
    for request in requests:
        if request.member.value not in record.members:
            raise DamagedSample(f"{_place(store, record, request.member)} is not there", Damage.MISSING)
    places = [record.members[request.member.value] for request in requests]
    wanted = [
        MemberParts(offset, size, request.spans, request.sha256)
        for request, (offset, size) in zip(requests, places, strict=True)
    ]
    try:
        found = store.members(record.shard, wanted)
    except FileNotFoundError as error:
        place = _place(store, record, requests[0].member)
        raise DamagedSample(f"{place} cannot be read ({error})", Damage.MISSING) from error
    for request, parts in zip(requests, found, strict=True):
        got, size = sum(map(len, parts)), sum(last - first for first, last in request.spans)
        if got != size:
            place = _place(store, record, request.member)
            raise DamagedSample(f"{place} gave {got} of {size} bytes: copy the truncated shard again", Damage.SHORT)
    return found


def read_sample(store: Store, record: SampleRecord) -> Sample:
    """Read and check all members of one sample. Raises as `read_member`."""
    hashes = {**read_facts(store, record).members, Member.FACTS.value: record.facts_sha256}
    members = [member for member in Member if member.value in record.members]
    return Sample(record.key, {one: read_member(store, record, one, hashes.get(one.value, "")) for one in members})


def read_facts(store: Store, record: SampleRecord) -> Facts:
    """Read the facts of one sample. Raises as `read_member`, and DamagedSample for facts of another sample."""
    text = read_member(store, record, Member.FACTS, record.facts_sha256)
    return facts_of(text, record, store.place(record.shard))


def facts_of(text: bytes, record: SampleRecord, place: str) -> Facts:
    """Parse facts from a member's bytes. Raises DamagedSample if they are not this sample's."""
    facts = parse_facts(text, f"shard {place}, sample {record.key}")
    if facts.key != record.key:
        raise DamagedSample(
            f"shard {place}, sample {record.key}: holds the facts of {facts.key}: {remedy(place)}",
            Damage.ALTERED,
        )
    if facts.shape != record.shape:
        raise DamagedSample(
            f"shard {place}, sample {record.key}: is of {facts.shape}, the index says {record.shape}: {remedy(place)}",
            Damage.ALTERED,
        )
    return facts


def read_array(store: Store, record: SampleRecord, facts: Facts, member: Member) -> Sliceable:
    """Open one member as an array that is decoded where it is sliced, and checked against its hashes.

    Raises DamagedSample, here or when it is sliced.
    """
    place, frame = _place(store, record, member), _partial_frame(store, record, facts, member)
    if frame is not None:
        return _CheckedArray(frame, place)
    return _open(read_member(store, record, member, facts.members.get(member.value, "")), facts, member, place)


def read_slices(
    store: Store, record: SampleRecord, facts: Facts, wanted: Mapping[Member, Slices]
) -> dict[Member, np.ndarray]:
    """Read slices of several arrays together: from a URL they take the time of one request.

    Args:
        store: the folder.
        record: the sample.
        facts: of the sample.
        wanted: a slice of each array. Steps must be 1.

    Returns:
        The slices, checked against the hashes of what was read for them.

    Raises:
        DamagedSample: bytes of an array are missing, too few, altered or undecodable.
        StoreError: the store cannot be read.
    """
    frames = {member: _partial_frame(store, record, facts, member) for member in wanted}
    missing = {member: frame.missing(wanted[member]) for member, frame in frames.items() if frame is not None}

    def request(member: Member) -> _Request:
        sha256, frame = facts.members.get(member.value, ""), frames[member]
        if frame is None:
            return _complete(member, record.members.get(member.value, (0, 0))[1], sha256)
        return _Request(member, missing[member].spans, partial(frame.is_sound, missing[member]), sha256)

    found = _read_checked(store, record, [request(member) for member in wanted])
    arrays: dict[Member, Sliceable] = {}
    for (member, frame), parts in zip(frames.items(), found, strict=True):
        place = _place(store, record, member)
        if frame is None:
            arrays[member] = _open(parts[0], facts, member, place)
        else:
            frame.add(missing[member], parts)
            arrays[member] = _CheckedArray(frame, place)
    return {member: arrays[member][slices] for member, slices in wanted.items()}


def _partial_frame(store: Store, record: SampleRecord, facts: Facts, member: Member) -> PartialFrame | None:
    """The frame of a member that is read in parts; None for a member that is read completely."""
    sha256, table = facts.members.get(member.value, ""), facts.chunks.get(member.value)
    if table is None:
        return None
    place = _place(store, record, member)
    if record.members.get(member.value, (0, 0))[1] != table.bytes:
        raise _altered(place)

    def fetch(spans: list[ByteRange], sound: Callable[[list[bytes]], bool]) -> list[bytes]:
        return _read_checked(store, record, [_Request(member, spans, sound, sha256)])[0]

    with _as_damage(place):
        return PartialFrame(table, fetch, _form(facts, member))


def array_of(content: bytes, facts: Facts, member: Member, place: str) -> Sliceable:
    """Open the array in a member's bytes, as `read_array`. Raises DamagedSample, here or when it is sliced."""
    if not _is_sound(content, facts.members.get(member.value, "")):
        raise _altered(place)
    return _open(content, facts, member, place)


def arrays_of(facts: Facts, stored: Collection[str]) -> list[Member]:
    """The arrays of a sample: those that its facts name, and others among the member endings in `stored`."""
    return [member for member in DTYPES if member.value in facts.members or member.value in stored]


def _open(content: bytes, facts: Facts, member: Member, place: str) -> Sliceable:
    with _as_damage(place):
        return _CheckedArray(WholeFrame(content, _form(facts, member)), place)


def _form(facts: Facts, member: Member) -> Form:
    return Form(tuple(facts.overview_shape if member in ON_OVERVIEW else facts.shape), DTYPES[member])


class _CheckedArray:
    """An array that raises DamagedSample if it cannot be decoded."""

    def __init__(self, array: Sliceable, place: str) -> None:
        self._array, self._place = array, place

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> Any:
        with _as_damage(self._place):
            return self._array.dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        with _as_damage(self._place):
            return self._array[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Without it numpy makes an array of one object.
        return np.array(self[:], dtype)


@contextmanager
def _as_damage(place: str) -> Iterator[None]:
    try:
        yield
    except SampleError as error:
        raise DamagedSample(f"{place}: {error}", Damage.UNREADABLE) from error


def _is_sound(content: bytes, sha256: str) -> bool:
    """Whether the bytes have this hash; True without one, for tars that segvol_pl did not pack."""
    return not sha256 or hashlib.sha256(content).hexdigest() == sha256


def _altered(place: str) -> DamagedSample:
    return DamagedSample(f"{place} is not what was packed: copy or pack the shard again", Damage.ALTERED)


def _place(store: Store, record: SampleRecord, member: Member) -> str:
    return f"shard {store.place(record.shard)}, sample {record.key}: {member.value}"
