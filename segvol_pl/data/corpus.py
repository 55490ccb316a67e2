"""The corpus: the samples of one or several folders of shards that a run reads, and how often an epoch sees each.

1. `open_folders` reads the indexes once.
2. `training_corpus` keeps the samples of a split, only labelled ones if labels are needed, and a fraction of them
   chosen by the hash of their content: 1 % is a part of 10 %, and 10 % of all, on every machine and after repacking.
   `held_out_corpus` keeps all samples of a split, of the folders that have it.
3. `source_names` names the folders in metrics.
4. `Corpus.rows` lists the samples of an epoch: with weight 2 a folder's samples come twice, with weight 0.5 half of
   them, a different half in each epoch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from segvol_pl.config import DataConfig
from segvol_pl.credentials import masked
from segvol_pl.data.cache import Cache
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.data.shard_index import Index, check_index, load_index, size_problems
from segvol_pl.data.store import OpenFiles, ShardSource, Store
from segvol_pl.errors import ConfigError, ShardError
from segvol_pl.launched import local_rank

log = logging.getLogger(__name__)

NAMED = 40
"""Characters of a source's name in metrics."""


def rng_of(*key: int) -> np.random.Generator:
    """The rng for a key, such as (seed, epoch, position). It draws the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class Part:
    """The chosen samples of one folder."""

    store: Store
    records: SampleTable
    times: float = 1.0
    """How often an epoch sees each sample; a fractional part means that share of the samples once more."""

    @property
    def dealt(self) -> int:
        """Samples of this part in an epoch."""
        return round(self.times * len(self.records))


@dataclass(frozen=True)
class Corpus:
    """The parts of all folders.

    Their records are numbered from 0, part after part; such a number is a row.

    Args:
        parts: in the order of the folders.
    """

    parts: list[Part]

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(part.dealt for part in self.parts)

    @property
    def num_volumes(self) -> int:
        """Number of rows."""
        return sum(len(part.records) for part in self.parts)

    def per_category(self) -> dict[str, float]:
        """Category -> how many of an epoch's samples hold it, over all parts."""
        counts: dict[str, float] = {}
        for part in self.parts:
            for name, count in part.records.per_category().items():
                counts[name] = counts.get(name, 0.0) + part.times * count
        return counts

    def place_of(self, row: int) -> tuple[int, int]:
        """The number of the part that a row belongs to, and its place among the part's records. Raises IndexError."""
        first = 0
        for number, part in enumerate(self.parts):
            if row < first + len(part.records):
                return number, row - first
            first += len(part.records)
        raise IndexError(f"row {row} is outside the corpus of {first} samples")

    def located(self, row: int) -> tuple[Store, SampleRecord]:
        """Store and record of a row. Raises IndexError."""
        number, place = self.place_of(row)
        return self.parts[number].store, self.parts[number].records[place]

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch before they are shuffled, int32 (num_samples,)."""
        dealt, first = list[np.ndarray](), 0
        for number, part in enumerate(self.parts):
            size = len(part.records)
            whole, rest = divmod(part.dealt, size)
            dealt.append(np.tile(np.arange(first, first + size, dtype=np.int32), whole))
            if rest:
                dealt.append(first + rng_of(seed, epoch, number, rest).permutation(size)[:rest])
            first += size
        return np.concatenate(dealt, dtype=np.int32)


@dataclass(frozen=True)
class Folder:
    """A folder of shards with its index."""

    store: Store
    weight: float
    """How often an epoch of training sees each of its samples."""
    index: Index


def check_folders(data: DataConfig) -> None:
    """Check that the local folders of the configuration have an index. It takes a moment, as nothing is read.

    Raises:
        ShardError: a folder has none.
        ConfigError: `data.mix` is wrong, see `parse_weighted`.
    """
    for path, _ in _weighted(data):
        check_index(Store(path))


def open_folders(data: DataConfig) -> list[Folder]:
    """Open the folders of the configuration.

    Raises:
        ShardError: a folder has no usable index.
        ConfigError: `data.mix` is wrong, see `parse_weighted`.
    """
    cache = Cache(data.cache, int(data.cache_gb * 1e9)) if data.cache else None
    stores = [(Store(path, data.retry_seconds, cache, OpenFiles()), weight) for path, weight in _weighted(data)]
    if len(stores) > 1 and any(store.piped for store, _ in stores):
        raise ConfigError("data.mix: a pipe: source is read in its own order and cannot be mixed with others")
    return [Folder(store, weight, _index_of(store, data)) for store, weight in stores]


def _weighted(data: DataConfig) -> list[tuple[str, float]]:
    return [(data.shards, 1.0), *(parse_weighted(entry) for entry in data.mix)]


def category_names(folders: Sequence[Folder]) -> list[str]:
    """The categories that any of the folders has, sorted by name."""
    return sorted({name for folder in folders for name in folder.index.categories})


def labelled_by(folders: Sequence[Folder]) -> dict[str, list[str]]:
    """Data set -> the categories that its folder of shards has; of several folders, those that all of them have."""
    found: dict[str, set[str]] = {}
    for index in (folder.index for folder in folders):
        found[index.dataset] = found.get(index.dataset, set(index.categories)) & set(index.categories)
    return {name: sorted(categories) for name, categories in found.items()}


def source_names(folders: Sequence[ShardSource], reserved: Collection[str] = ()) -> list[str]:
    """Name each folder as metrics do, by the end of its path: the folder's own name, or more if two would be equal.

    Every run of characters besides letters, digits, `_`, `.` and `-` becomes one `_`, and the last `NAMED` characters
    are kept. Names that are still equal, or reserved, get a number: `amos`, `amos-2`.
    """
    paths = [[part for part in re.split(r"[/\\]+", masked(str(folder)).split("?")[0]) if part] for folder in folders]
    for deep in range(1, max(map(len, paths), default=1) + 1):
        names = [_cleaned("_".join(path[-deep:])) for path in paths]
        if len(set(names)) == len(names):
            break
    found: list[str] = []
    for name in names if paths else []:
        number, free = 2, name
        while free in found or free in reserved:
            number, free = number + 1, f"{name}-{number}"
        found.append(free)
    return found


def _cleaned(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-NAMED:].strip("_.") or "source"


def training_corpus(folders: Sequence[Folder], data: DataConfig, labelled: bool) -> Corpus:
    """The samples of training. Raises ConfigError if no sample of a folder is left."""
    return Corpus([_training_part(folder, data, labelled) for folder in folders])


def _training_part(folder: Folder, data: DataConfig, labelled: bool) -> Part:
    chosen = _records_of(folder, data.split, labelled)
    if not chosen:
        raise _no_samples([folder], data.split, labelled)
    kept = nested(chosen, data.fraction, folder.store.folder)
    return Part(folder.store, kept, folder.weight * data.samples_per_volume)


def held_out_corpus(folders: Sequence[Folder], split: str, labelled: bool) -> Corpus:
    """Every sample of a split once, also of folders with a weight. Raises ConfigError if no folder has any.

    Folders without the split are used for training only.
    """
    held = [(folder, _records_of(folder, split, labelled)) for folder in folders]
    parts = [Part(folder.store, chosen) for folder, chosen in held if chosen]
    if not parts:
        raise _no_samples(folders, split, labelled)
    for folder, chosen in held:
        if not chosen:
            log.info(
                "%s has no samples in %r: held-out samples come from the other folders", folder.store.folder, split
            )
    return Corpus(parts)


def _index_of(store: Store, data: DataConfig) -> Index:
    """The folder's index. Missing or truncated shards are tolerated up to `data.max_bad_fraction` of the samples."""
    index = load_index(store)
    # Once a node: thousands of ranks would ask a file system for the sizes of thousands of shards.
    problems = size_problems(store, index) if local_rank() == 0 else {}
    affected = sum(count for shard, count in index.samples.per_shard().items() if shard in problems)
    if affected > data.max_bad_fraction * len(index.samples):
        raise ShardError(next(iter(problems.values())))
    for problem in problems.values():
        log.warning("%s; samples that cannot be read are replaced", problem)
    return index


def parse_weighted(entry: str) -> tuple[str, float]:
    """Folder and weight of `DIR` or `WEIGHT*DIR`. Raises ConfigError for a weight that is not a positive number."""
    weight, star, folder = entry.partition("*")
    if not star:
        return entry, 1.0
    try:
        times = float(weight)
    except ValueError:
        times = 0.0
    if not (times > 0 and math.isfinite(times)) or not folder:
        raise ConfigError(f"data.mix: {masked(entry)!r} is not DIR or WEIGHT*DIR with a positive weight", "data.mix")
    return folder, times


def _records_of(folder: Folder, split: str, labelled: bool) -> SampleTable:
    records = folder.index.samples.of_split(split)
    return records.labelled() if labelled else records


def _no_samples(folders: Sequence[Folder], split: str, labelled: bool) -> ConfigError:
    kind = "labelled samples" if labelled else "samples"
    found = [
        f"{masked(str(folder.store.folder))} has no {kind} in {split!r} (it has {folder.index.splits})"
        for folder in folders
    ]
    return ConfigError(f"data.split, data.val_split: {'; '.join(found)}")


def nested(records: SampleTable, fraction: float, folder: ShardSource) -> SampleTable:
    """A fraction of the records, chosen by content hash so that smaller fractions are parts of larger ones.

    Returns:
        At least one record, in the order given.

    Raises:
        ConfigError: the index of `folder` was written before it held the hashes.
    """
    if fraction == 1:
        return records
    # The hash itself decides the split: hash it again, so that the subset does not depend on the split.
    ranks = [content and hashlib.sha256(b"subset " + content).digest() for (content,) in records.texts("content")]
    if not all(ranks):
        place = masked(str(folder))
        raise ConfigError(f"data.fraction: the index of {place} has no content hashes: run segvol-pl index {place}")
    first = sorted(range(len(records)), key=ranks.__getitem__)[: max(1, round(fraction * len(records)))]
    return records.chosen(np.sort(np.array(first)))
