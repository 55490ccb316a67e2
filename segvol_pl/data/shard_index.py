"""The index of a folder of shards: where every member of every sample lies, without opening a shard.

1. `load_index` reads `index.json` and refuses what does not describe its shards: an index is data from elsewhere.
2. `read_index` also compares the sizes of the shards in a local folder with those in the index.
3. `list_samples` (command `inspect`) lists the samples.

`index_builder` writes it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segvol_pl.data.schema import SCHEMA
from segvol_pl.data.store import INDEX, ShardSource, Store
from segvol_pl.errors import ShardError

KEY = re.compile(r"[A-Za-z0-9_-]+")
"""Form of a sample's key. Files are named after it, so it holds no dot and no slash."""


@dataclass(frozen=True)
class Shard:
    """One tar of a folder."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Category:
    """One category over all samples of a folder."""

    values: list[int]
    cases: int
    voxels: int


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
class Index:
    """`index.json`: what is known of a folder of shards without opening them."""

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
        """Parse an index. Raises ShardError, naming `place`, for another schema or a file that is not an index."""
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
            raise ShardError(f"{place} is not an index of shards ({error}): {remedy(place)}") from error

    def _check(self, place: str) -> None:
        """Raise ShardError unless everything that the index names lies once, and within its shards."""
        sizes: dict[str, int] = {}
        for shard in self.shards:
            require_kind(shard.bytes, int, f"bytes of shard {shard.name}")
            if shard.name in sizes:
                raise ShardError(f"{place}: lists shard {shard.name} twice: {remedy(place)}")
            sizes[shard.name] = shard.bytes
        require_shape(self.overview_shape, "overview_shape")
        check_keys(self.samples, place)
        for record in self.samples:
            check_key(record.key, place)
            record.check_kinds()
            if record.shard not in sizes:
                raise ShardError(f"{place}: sample {record.key} is in a shard that it does not list: {remedy(place)}")
            for ending, (offset, size) in record.members.items():
                if not (0 <= offset <= offset + size <= sizes[record.shard]):
                    raise ShardError(
                        f"{place}: sample {record.key}: {ending} lies outside {record.shard}: {remedy(place)}"
                    )


def check_key(key: str, place: str) -> None:
    """Raise ShardError, naming `place`, if a sample's key could not name a file."""
    if not KEY.fullmatch(key):
        raise ShardError(f"{place}: {key!r} is not a key (letters, digits, _ and -): pack the data again")


def check_keys(records: list[SampleRecord], place: str) -> None:
    """Raise ShardError, naming both shards, if two samples have one key."""
    seen: dict[str, str] = {}
    for record in records:
        if record.key in seen:
            raise ShardError(
                f"{place}: sample {record.key} is in {seen[record.key]} and in {record.shard}: remove one of them"
            )
        seen[record.key] = record.shard


def read_index(store: Store) -> Index:
    """Read the index of a folder, and check the sizes of the shards in a local folder.

    A truncated shard elsewhere is found when a read is too short.

    Raises:
        ShardError: the index is missing or not valid, or a shard is missing or has another size.
        StoreError: the store cannot be read.
    """
    index = load_index(store)
    for problem in size_problems(store, index).values():
        raise ShardError(problem)
    return index


def size_problems(store: Store, index: Index) -> dict[str, str]:
    """Shard -> what is wrong with its size, in words. Empty unless the folder is local."""
    if not store.local:
        return {}
    found = {shard.name: size_problem(Path(store.place(shard.name)), shard) for shard in index.shards}
    return {name: problem for name, problem in found.items() if problem}


def load_index(store: Store) -> Index:
    """Read the index of a folder, without checking its shards.

    Raises:
        ShardError: there is none, or it is not valid.
        StoreError: the store cannot be read.
    """
    place = store.place(INDEX)
    try:
        text = store.file(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{place} does not exist: {remedy(place)}") from None
    return Index.from_json(text.decode("utf-8", errors="replace"), place)


def size_problem(path: Path, shard: Shard) -> str:
    """What is wrong with a shard's size, in words; empty if nothing is."""
    if not path.is_file():
        return f"shard {path} is missing although the index names it: copy it there, or {remedy(str(path))}"
    size = path.stat().st_size
    if size == shard.bytes:
        return ""
    fault = "is truncated" if size < shard.bytes else "is not the one indexed"
    return f"shard {path} {fault} ({size} bytes, the index says {shard.bytes}): copy or pack it again"


def remedy(place: str) -> str:
    """The command that writes a damaged index again."""
    return f"run segvol-pl index {place.rpartition('/')[0] or '.'}"


def list_samples(folder: ShardSource) -> list[dict[str, Any]]:
    """One row per sample, for the command `inspect`: key, split, shape, spacing (mm), categories, bytes, shard."""
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
