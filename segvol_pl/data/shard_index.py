"""The index of a folder of shards: where every member of every sample lies, without opening a shard.

1. `write_index` writes `index.json`. The samples of a large folder are rows of a file next to it, which is mapped, not
   parsed, see `sample_table`.
2. `load_index` reads it and refuses what does not describe its shards: an index is data from elsewhere.
3. `read_index` also compares the sizes of the shards in a local folder with those in the index.
4. `list_samples` (command `inspect`) lists the samples.

`index_builder` writes it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segvol_pl.atomic import write_text
from segvol_pl.data.sample_table import (
    Names,
    SampleRecord,
    SampleTable,
    check_key,
    require_kind,
    require_shape,
)
from segvol_pl.data.schema import SCHEMA
from segvol_pl.data.store import INDEX, ShardSource, Store
from segvol_pl.errors import ShardError

INLINE = 10_000
"""Most samples that are listed in `index.json` itself; more are rows of a file that it names."""
ROWS = "index-{digest}.npy"
"""That file's name. It is named by its bytes, so an index never reads the rows of another."""


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
class Index:
    """What is known of a folder of shards without opening them."""

    dataset: str
    overview_shape: list[int]
    shards: list[Shard]
    splits: dict[str, int]
    """Split -> samples."""
    categories: dict[str, Category]
    samples: SampleTable
    schema: int = SCHEMA

    def to_json(self, rows: RowsFile | None = None) -> str:
        """The bytes of `index.json`: the same index gives the same. rows: the file of the samples, if they have one."""
        parts = {
            "dataset": self.dataset,
            "overview_shape": self.overview_shape,
            "shards": [asdict(shard) for shard in self.shards],
            "splits": self.splits,
            "categories": {name: asdict(facts) for name, facts in self.categories.items()},
            "samples": asdict(rows) if rows else [asdict(record) for record in self.samples],
            "schema": self.schema,
        }
        return json.dumps(parts, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class RowsFile:
    """The file that holds the samples of a large index."""

    file: str
    bytes: int
    digest: str
    """See `SampleTable.digest`."""
    names: Names


def parse_index(text: bytes, store: Store) -> Index:
    """Parse `index.json`, and map the rows of its samples if they are in a file.

    Raises:
        ShardError: it has another schema, is not an index, or describes what cannot be.
        StoreError: the store cannot be read.
    """
    place = store.place(INDEX)
    try:
        raw = json.loads(text.decode("utf-8", errors="replace"))
        if raw["schema"] != SCHEMA:
            raise ShardError(f"{place}: schema {raw['schema']} but this version reads {SCHEMA}: pack the data again")
        samples, inline = raw["samples"], isinstance(raw["samples"], list)
        parts = {
            "shards": [Shard(**shard) for shard in raw["shards"]],
            "categories": {name: Category(**facts) for name, facts in raw["categories"].items()},
            "samples": _table_of(samples, place) if inline else _mapped_table(samples, store),
        }
        index = Index(**{**raw, **parts})
        require_shape(index.overview_shape, "overview_shape")
        index.samples.check(_shard_bytes(index, place), place, remedy(place))
        return index
    except ShardError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(f"{place} is not an index of shards ({error}): {remedy(place)}") from error


def _table_of(samples: list[dict[str, Any]], place: str) -> SampleTable:
    records = [SampleRecord(**record) for record in samples]
    for record in records:
        check_key(record.key, place)
        record.check_kinds()
    return SampleTable.of(records)


def _mapped_table(samples: dict[str, Any], store: Store) -> SampleTable:
    rows = RowsFile(**{**samples, "names": Names(**samples["names"])})
    require_kind(rows.bytes, int, "bytes of its samples")
    place = store.place(rows.file)
    try:
        path, keeps = store.as_file(rows.file, rows.bytes)
        table = SampleTable.mapped(path, rows.names, keeps)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{place} is missing although the index names it: copy it there, or {remedy(place)}") from None
    except ValueError as error:
        raise ShardError(f"{place} does not hold the samples of an index ({error}): {remedy(place)}") from error
    if table.digest() != rows.digest:
        raise ShardError(f"{place} is not what the index was written with: copy it again, or {remedy(place)}")
    return table


def _shard_bytes(index: Index, place: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for shard in index.shards:
        require_kind(shard.bytes, int, f"bytes of shard {shard.name}")
        if shard.name in sizes:
            raise ShardError(f"{place}: lists shard {shard.name} twice: {remedy(place)}")
        sizes[shard.name] = shard.bytes
    return sizes


def write_index(folder: Path, index: Index) -> None:
    """Write the index of a local folder. If this is interrupted, the index is the one before, or the new one."""
    rows = _save_rows(folder, index.samples) if len(index.samples) > INLINE else None
    write_text(folder / INDEX, index.to_json(rows) + "\n")
    remove_rows(folder, index)


def remove_rows(folder: Path, index: Index) -> None:
    """Remove the rows of earlier indexes from a folder; processes that have mapped them keep them."""
    kept = ROWS.format(digest=index.samples.digest()) if len(index.samples) > INLINE else ""
    for path in folder.glob(ROWS.format(digest="*")):
        if path.name != kept:
            path.unlink(missing_ok=True)


def _save_rows(folder: Path, samples: SampleTable) -> RowsFile:
    digest = samples.digest()
    file = ROWS.format(digest=digest)
    samples.save(folder / file)
    return RowsFile(file, (folder / file).stat().st_size, digest, samples.names)


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
    try:
        text = store.file(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_index(store) from None
    return parse_index(text, store)


def check_index(store: Store) -> None:
    """Check that a folder of this machine has an index, without reading it. Raises ShardError."""
    if not store.local:
        return
    try:
        Path(store.place(INDEX)).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _no_index(store) from None
    except OSError:
        return  # A mount may be away: reading the index tries again, and says what failed.


def _no_index(store: Store) -> ShardError:
    place = store.place(INDEX)
    return ShardError(f"{place} does not exist: {remedy(place)}")


def size_problem(path: Path, shard: Shard) -> str:
    """What is wrong with a shard's size, in words; empty if nothing is."""
    # One call for each shard: a corpus has tens of thousands, on a file system that all nodes ask.
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        return f"shard {path} is missing although the index names it: copy it there, or {remedy(str(path))}"
    size = found.st_size
    if size == shard.bytes:
        return ""
    fault = "is truncated" if size < shard.bytes else "is not the one indexed"
    return f"shard {path} {fault} ({size} bytes, the index says {shard.bytes}): copy or pack it again"


def remedy(place: str) -> str:
    """The command that writes a damaged index again."""
    return f"run segvol-pl index {place.rpartition('/')[0] or '.'}"


def list_samples(folder: ShardSource) -> Iterator[dict[str, Any]]:
    """One row per sample, for the command `inspect`: key, split, shape, spacing (mm), categories, bytes, shard."""
    for record in read_index(Store(folder)).samples:
        yield {
            "key": record.key,
            "split": record.split,
            "shape": tuple(record.shape),
            "spacing": tuple(round(step, 3) for step in record.spacing) if record.spacing else "unknown",
            "categories": record.categories,
            "bytes": sum(size for _, size in record.members.values()),
            "shard": record.shard,
        }
