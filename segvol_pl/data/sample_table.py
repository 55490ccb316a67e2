"""The samples of an index as columns: in memory, or mapped from a file that all processes of a node share.

1. `SampleRecord` is one sample: where it lies, and what a loader needs to know before it reads.
2. `SampleTable` holds many as the rows of one numpy array. It is a sequence of records, each made when it is
   needed, and selects rows by their columns. A table and its parts share one array.
3. `SampleTable.save` writes the array as a `.npy` file, and `SampleTable.mapped` maps it: nothing is parsed, and other
   processes, however they are started, map the same pages.

A row takes about 300 bytes, so a million samples take 0.3 GB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash

from segvol_pl.atomic import atomic_path
from segvol_pl.errors import ShardError

KEY = re.compile(r"[A-Za-z0-9_-]+")
"""Form of a sample's key. Files are named after it, so it holds no dot and no slash."""
ABSENT = -1
"""Offset of a member that a sample lacks."""
BLOCK = 1 << 16
"""Rows that are checked or hashed at a time: memory does not grow with the table."""
EMPTY = np.uint64(0)
"""Fingerprint of an empty text, such as a hash that an old index lacks."""
MIX = np.uint64(0x9E3779B97F4A7C15)
"""An odd number that spreads its factor over 64 bits: the golden ratio's, as in Fibonacci hashing."""


@dataclass(frozen=True)
class SampleRecord:
    """Where one sample lies, and what a loader needs to know before it reads."""

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
    """sha256 of the facts' bytes, which hold the hashes of the other members. Empty as `content`."""

    def check_kinds(self) -> None:
        """Raise TypeError for a value of another type than declared."""
        require_shape(self.shape, f"shape of sample {self.key}")
        for text in (self.shard, self.split, self.content, self.facts_sha256):
            require_kind(text, str, f"sample {self.key}")
        for ending, place in self.members.items():
            for number in place:
                require_kind(number, int, f"place of {ending} of sample {self.key}")
            if len(place) != 2 or min(place) < 0:
                raise TypeError(f"place of {ending} of sample {self.key}: {place!r} is not an offset and a size")


def require_kind(value: object, kind: type, name: str) -> None:
    """Raise TypeError unless the value called `name` is exactly of that type."""
    # A bool does not count as a number.
    if type(value) is not kind:
        raise TypeError(f"{name}: {value!r} is not of type {kind.__name__}")


def require_shape(shape: object, name: str) -> None:
    """Raise TypeError unless the value called `name` is a list of three whole numbers above 0."""
    if not isinstance(shape, list) or len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise TypeError(f"{name}: {shape!r} is not a shape of three axes")


@dataclass(frozen=True)
class Names:
    """What the numbers in a table stand for, each list sorted."""

    shards: list[str]
    splits: list[str]
    categories: list[str]
    members: list[str]
    """Member endings."""

    @classmethod
    def of(cls, records: Sequence[SampleRecord]) -> Names:
        """The names that occur in the records."""
        return cls(
            shards=sorted({record.shard for record in records}),
            splits=sorted({record.split for record in records}),
            categories=sorted({name for record in records for name in record.categories}),
            members=sorted({ending for record in records for ending in record.members}),
        )

    @classmethod
    def union(cls, parts: Sequence[Names]) -> Names:
        """The names that occur in any of the parts."""
        return cls(**{field: sorted({name for part in parts for name in getattr(part, field)}) for field in FIELDS})


FIELDS = ("shards", "splits", "categories", "members")


def row_dtype(names: Names, key: int, content: int, facts_sha256: int) -> np.dtype[np.void]:
    """The dtype of a row; the numbers are bytes of its texts."""
    columns: list[Any] = [
        ("key", f"S{max(key, 1)}"),
        ("shard", "<u4"),
        ("split", "<u2"),
        ("labelled", "?"),
        ("shape", "<i4", (3,)),
        ("spacing", "<f8", (3,)),
        ("members", "<i8", (max(len(names.members), 1), 2)),
        ("categories", "u1", (-(-max(len(names.categories), 1) // 8),)),
        ("content", f"S{max(content, 1)}"),
        ("facts_sha256", f"S{max(facts_sha256, 1)}"),
    ]
    return np.dtype(columns)


class SampleTable(Sequence[SampleRecord]):
    """Samples as the rows of one array. Make one by `of`, `joined` or `mapped`.

    Args:
        names: what the numbers in the rows stand for.
        rows: the array; its dtype is that of `row_dtype`.
        chosen: numbers of the rows that this table holds; None: all.
        path: the file that the rows are mapped from; None: they are in memory.
        keeps: kept as long as the table, such as a temporary file.
    """

    def __init__(
        self,
        names: Names,
        rows: np.ndarray,
        chosen: np.ndarray | None = None,
        path: Path | None = None,
        keeps: object = None,
    ) -> None:
        self.names, self._rows, self._chosen, self._path, self._keeps = names, rows, chosen, path, keeps

    @classmethod
    def of(cls, records: Sequence[SampleRecord]) -> SampleTable:
        """A table of the records, in memory. Raises ValueError, OverflowError for values that no row can hold."""
        names = Names.of(records)
        texts = [[getattr(record, text).encode("ascii") for record in records] for text in TEXTS]
        rows = np.zeros(len(records), row_dtype(names, *(max(map(len, text), default=1) for text in texts)))
        for name, text in zip(TEXTS, texts, strict=True):
            rows[name] = text
        shards, splits = _numbers(names.shards), _numbers(names.splits)
        rows["shard"] = [shards[record.shard] for record in records]
        rows["split"] = [splits[record.split] for record in records]
        rows["labelled"] = [record.labelled for record in records]
        rows["members"] = ABSENT
        members, categories = _numbers(names.members), _numbers(names.categories)
        for row, record in zip(rows, records, strict=True):
            row["shape"] = record.shape
            row["spacing"] = np.nan if record.spacing is None else record.spacing
            for ending, place in record.members.items():
                row["members"][members[ending]] = place
            present = np.zeros(8 * row["categories"].size, np.uint8)
            present[[categories[name] for name in record.categories]] = 1
            row["categories"] = np.packbits(present)
        return cls(names, rows)

    @classmethod
    def joined(cls, tables: Sequence[SampleTable]) -> SampleTable:
        """One table of the samples of all, in memory."""
        names = Names.union([table.names for table in tables])
        dtypes = [table._rows.dtype for table in tables]
        widths = (max((dtype[text].itemsize for dtype in dtypes), default=1) for text in TEXTS)
        rows = np.zeros(sum(map(len, tables)), row_dtype(names, *widths))
        rows["members"] = ABSENT
        first = 0
        for table in tables:
            part, own = rows[first : first + len(table)], table._selected()
            for name in (*TEXTS, "labelled", "shape", "spacing"):
                part[name] = own[name]
            part["shard"] = _translation(table.names.shards, names.shards)[own["shard"]]
            part["split"] = _translation(table.names.splits, names.splits)[own["split"]]
            part["members"][:, _translation(table.names.members, names.members)] = own["members"][
                :, : len(table.names.members)
            ]
            present = np.zeros((len(table), 8 * part["categories"].shape[1]), np.uint8)
            bits = np.unpackbits(own["categories"], axis=1, count=len(table.names.categories))
            present[:, _translation(table.names.categories, names.categories)] = bits
            part["categories"] = np.packbits(present, axis=1)
            first += len(table)
        return cls(names, rows)

    @classmethod
    def mapped(cls, path: Path, names: Names, keeps: object = None) -> SampleTable:
        """The table in a file that `save` wrote.

        Args:
            path: the file.
            names: those that it was saved with.
            keeps: kept as long as the table is, such as a temporary file.

        Raises:
            OSError, ValueError: it is no such file.
        """
        try:
            rows = np.asarray(np.lib.format.open_memmap(path, mode="r"))
        except OSError:
            raise
        except Exception as error:  # any error is possible: numpy parses the head as Python
            raise ValueError(f"it is no .npy file: {error}") from error
        dtype = rows.dtype
        if dtype.names is None or not set(TEXTS) <= set(dtype.names):
            raise ValueError(f"its rows are {dtype}")
        wanted = row_dtype(names, *(dtype[text].itemsize for text in TEXTS))
        if dtype != wanted or rows.ndim != 1:
            raise ValueError(f"its rows are {dtype}, not {wanted}")
        return cls(names, rows, None, path, keeps)

    def save(self, path: Path) -> None:
        """Write the rows, atomically, as a `.npy` file. Equal tables give equal bytes."""
        with atomic_path(path, ".npy") as part:
            np.save(part, self._selected(), allow_pickle=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is started by spawn maps the file too; an array would be copied into each.
        if self._path is not None:
            return _mapped_part, (self._path, self.names, self._chosen)
        return SampleTable, (self.names, self._selected())

    def __len__(self) -> int:
        return len(self._rows if self._chosen is None else self._chosen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SampleTable) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, number: int) -> SampleRecord: ...
    @overload
    def __getitem__(self, number: slice) -> SampleTable: ...
    def __getitem__(self, number: int | slice) -> SampleRecord | SampleTable:
        if isinstance(number, slice):
            return self.chosen(np.arange(len(self))[number])
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of a table of {len(self)} samples")
        return self._record(self._rows[number if self._chosen is None else self._chosen[number]])

    def _record(self, row: np.void) -> SampleRecord:
        names, spacing = self.names, row["spacing"].tolist()
        present = np.unpackbits(row["categories"], count=len(names.categories))
        return SampleRecord(
            key=row["key"].decode("ascii"),
            shard=names.shards[row["shard"]],
            split=names.splits[row["split"]],
            labelled=bool(row["labelled"]),
            shape=row["shape"].tolist(),
            spacing=None if spacing[0] != spacing[0] else spacing,
            categories=[names.categories[number] for number in np.flatnonzero(present)],
            members={
                ending: place
                for ending, place in zip(names.members, row["members"].tolist(), strict=False)
                if place[0] != ABSENT
            },
            content=row["content"].decode("ascii"),
            facts_sha256=row["facts_sha256"].decode("ascii"),
        )

    def chosen(self, numbers: np.ndarray) -> SampleTable:
        """The rows of these numbers, in their order; the array is shared."""
        narrow = numbers.astype(np.uint32)
        return SampleTable(
            self.names, self._rows, narrow if self._chosen is None else self._chosen[narrow], self._path, self._keeps
        )

    def where(self, mask: np.ndarray) -> SampleTable:
        """The rows whose entry in `mask`, bool (rows,), is True."""
        return self if mask.all() else self.chosen(np.flatnonzero(mask))

    def column(self, name: str) -> np.ndarray:
        """One column of `row_dtype`: (rows, ...)."""
        values = self._rows[name]
        return values if self._chosen is None else values[self._chosen]

    def of_split(self, split: str) -> SampleTable:
        """The samples of a split; `all`: of every split."""
        if split == "all":
            return self
        number = _numbers(self.names.splits).get(split)
        return self.where(np.zeros(len(self), bool) if number is None else self.column("split") == number)

    def labelled(self) -> SampleTable:
        """The samples with labels."""
        return self.where(self.column("labelled"))

    def lacking(self, ending: str) -> SampleTable:
        """The samples without this member."""
        number = _numbers(self.names.members).get(ending)
        return self if number is None else self.where(self.column("members")[:, number, 0] == ABSENT)

    def per_shard(self) -> dict[str, int]:
        """Shard -> number of samples, for shards that have any."""
        return self._counted("shard", self.names.shards)

    def per_split(self) -> dict[str, int]:
        """Split -> number of samples, for splits that have any."""
        return self._counted("split", self.names.splits)

    def per_category(self) -> dict[str, int]:
        """Category -> number of samples that hold it, for categories that any holds."""
        names = self.names.categories
        present = np.unpackbits(self.column("categories"), axis=1, count=len(names))
        counts = present.sum(0, dtype=np.int64).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}

    def _counted(self, column: str, names: list[str]) -> dict[str, int]:
        counts = np.bincount(self.column(column), minlength=len(names)).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}

    def by_shard(self) -> dict[str, SampleTable]:
        """Shard -> its samples."""
        shards = self.column("shard")
        order = np.argsort(shards, kind="stable")
        ends = np.cumsum(np.bincount(shards, minlength=len(self.names.shards))).tolist()
        places = zip(self.names.shards, [0, *ends], ends, strict=False)
        return {name: self.chosen(order[first:end]) for name, first, end in places if first < end}

    def texts(self, *columns: str) -> Iterator[tuple[bytes, ...]]:
        """The values of text columns, row by row."""
        for block in self._blocks():
            yield from zip(*(block[name].tolist() for name in columns), strict=True)

    def digest(self) -> str:
        """A hash over all values and names. Equal samples in one order give one hash, wherever they are held."""
        # As in the head of a .npy file: numpy's own text for a dtype differs between its versions.
        digest = xxhash.xxh3_128(repr((asdict(self.names), self._rows.dtype.descr)).encode())
        for block in self._blocks():
            digest.update(block.view(np.uint8).data)
        return digest.hexdigest()

    def fingerprints(self, column: str) -> np.ndarray:
        """uint64 (rows,): equal for equal texts of a column, and for others once in 2**64."""
        found = np.zeros(len(self), np.uint64)
        first = 0
        for block in self._blocks():
            width = -(-block.dtype[column].itemsize // 8) * 8
            words = np.ascontiguousarray(block[column].astype(f"S{width}")).view("<u8").reshape(len(block), -1)
            for place, word in enumerate(words.T):
                # Zero stays zero: texts are equal however many zeros fill them up.
                mixed = (word ^ (word >> np.uint64(32))) * MIX
                found[first : first + len(block)] ^= (mixed ^ (mixed >> np.uint64(29))) * np.uint64(2 * place + 1)
            first += len(block)
        return found

    def check(self, shard_bytes: dict[str, int], place: str, remedy: str) -> None:
        """Check that everything lies once, and within its shard.

        Args:
            shard_bytes: size of each shard.
            place: the index's place, for the message.
            remedy: how to repair the index, for the message.

        Raises:
            ShardError: naming the first sample that does not.
        """
        unlisted = [name for name in self.names.shards if name not in shard_bytes]
        if unlisted:
            raise ShardError(f"{place}: samples are in a shard that it does not list ({unlisted[0]}): {remedy}")
        sizes = np.array([shard_bytes[name] for name in self.names.shards], dtype=np.int64)
        for block in self._blocks():
            if (block["shard"] >= len(self.names.shards)).any() or (block["split"] >= len(self.names.splits)).any():
                raise ShardError(f"{place}: a sample's shard or split has no name: {remedy}")
            places = block["members"]
            offsets, lengths = places[..., 0], places[..., 1]
            room = sizes[block["shard"]][:, None] - lengths
            outside = (offsets != ABSENT) & ((offsets < 0) | (lengths < 0) | (offsets > room))
            if outside.any():
                row, member = (int(found[0]) for found in np.nonzero(outside))
                record = self._record(block[row])
                ending = self.names.members[member]
                raise ShardError(f"{place}: sample {record.key}: {ending} lies outside {record.shard}: {remedy}")
            for key in block["key"][~_are_keys(block["key"])].tolist()[:1]:
                check_key(key.decode("latin-1"), place)
            if (block["shape"] < 1).any():
                raise ShardError(f"{place}: a sample has an axis without voxels: {remedy}")
        self._check_unique(place)

    def _check_unique(self, place: str) -> None:
        fingerprints = self.fingerprints("key")
        order = np.argsort(fingerprints, kind="stable")
        again = np.flatnonzero(fingerprints[order[1:]] == fingerprints[order[:-1]])
        seen: dict[str, str] = {}
        for record in self.chosen(np.unique(np.concatenate([order[again], order[again + 1]]))):
            if record.key in seen:
                raise ShardError(
                    f"{place}: sample {record.key} is in {seen[record.key]} and in {record.shard}: remove one of them"
                )
            seen[record.key] = record.shard

    def _selected(self) -> np.ndarray:
        return self._rows if self._chosen is None else self._rows[self._chosen]

    def _blocks(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self), BLOCK):
            part = slice(first, first + BLOCK)
            yield self._rows[part] if self._chosen is None else self._rows[self._chosen[part]]


TEXTS = ("key", "content", "facts_sha256")
"""The columns of text, in the order of `row_dtype`'s arguments."""


def _mapped_part(path: Path, names: Names, chosen: np.ndarray | None) -> SampleTable:
    table = SampleTable.mapped(path, names)
    return SampleTable(names, table._rows, chosen, path)


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _translation(before: Sequence[str], after: Sequence[str]) -> np.ndarray:
    """The number of each name of `before` in `after`."""
    numbers = _numbers(after)
    return np.array([numbers[name] for name in before], dtype=np.int64)


def check_key(key: str, place: str) -> None:
    """Raise ShardError, naming `place`, if a sample's key could not name a file."""
    if not KEY.fullmatch(key):
        raise ShardError(f"{place}: {key!r} is not a key (letters, digits, _ and -): pack the data again")


def _are_keys(keys: np.ndarray) -> np.ndarray:
    """Whether each is of the form `KEY`: bool (rows,)."""
    allowed = np.zeros(256, bool)
    allowed[[code for code in range(128) if KEY.fullmatch(chr(code))]] = True
    letters = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), -1)
    ended = letters == 0
    # Zeros fill up the end of a text; one before another letter is part of it.
    inner = ended[:, :-1] & ~ended[:, 1:]
    fits: np.ndarray = (allowed[letters] | ended).all(axis=1) & ~ended[:, 0] & ~inner.any(axis=1)
    return fits
