"""The corpus: the samples of one or several folders of shards that a run reads, and how often an epoch sees each.

1. `open_folders` reads the indexes once.
2. `training_corpus` keeps a split, labelled samples alone where labels are needed, and a share of them by the hash of
   their content: 1 % lies within 10 %, 10 % within all, on every machine and in every repacking. `held_out_corpus`
   keeps a split whole, of the folders that have it.
3. `rows` deals the samples of an epoch: those of a folder with weight 2 twice, with weight 0.5 every other one, and
   which ones changes from epoch to epoch.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segvol_pl.config import DataConfig
from segvol_pl.credentials import masked
from segvol_pl.data.cache import Cache
from segvol_pl.data.shard_index import Index, SampleRecord, load_index, size_problems
from segvol_pl.data.store import Source, Store
from segvol_pl.errors import ConfigError, ShardError

log = logging.getLogger(__name__)


def rng_of(*key: int) -> np.random.Generator:
    """The rng of a place in the data: its key alone decides what it draws, on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class Part:
    """The chosen samples of one folder."""

    store: Store
    records: list[SampleRecord]
    times: float = 1.0
    """How often an epoch sees each; of a fraction, that share of them."""

    @property
    def dealt(self) -> int:
        """Samples of it in an epoch."""
        return round(self.times * len(self.records))


@dataclass(frozen=True)
class Corpus:
    """Parts, their records numbered through: a row is a place in that numbering."""

    parts: list[Part]

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(part.dealt for part in self.parts)

    @property
    def records(self) -> list[SampleRecord]:
        """All of them, by row."""
        return [record for part in self.parts for record in part.records]

    def located(self, row: int) -> tuple[Store, SampleRecord]:
        """Store and record of a row."""
        first = 0
        for part in self.parts:
            if row < first + len(part.records):
                return part.store, part.records[row - first]
            first += len(part.records)
        raise IndexError(f"row {row} is beyond the corpus of {first}")

    def rows(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch before they are shuffled, int64 (num_samples,)."""
        dealt, first = [], 0
        for number, part in enumerate(self.parts):
            size = len(part.records)
            whole, rest = divmod(part.dealt, size)
            dealt.append(first + np.tile(np.arange(size), whole))
            if rest:
                dealt.append(first + rng_of(seed, epoch, number, rest).permutation(size)[:rest])
            first += size
        return np.concatenate(dealt).astype(np.int64)


@dataclass(frozen=True)
class Folder:
    """A folder of shards with its index."""

    store: Store
    weight: float
    """How often an epoch of training sees each of its samples."""
    index: Index


def open_folders(data: DataConfig) -> list[Folder]:
    """The folders that the configuration names. Raises ShardError for one that cannot be used; see `parse_weighted`."""
    named = [(data.shards, 1.0), *(parse_weighted(entry) for entry in data.mix)]
    cache = Cache(data.cache, int(data.cache_gb * 1e9)) if data.cache else None
    stores = [(Store(path, data.retry_seconds, cache), weight) for path, weight in named]
    if len(stores) > 1 and any(store.piped for store, _ in stores):
        raise ConfigError("data.mix: a pipe: source cannot be mixed with others: it is read in its own order")
    return [Folder(store, weight, _opened(store, data)) for store, weight in stores]


def category_names(folders: Sequence[Folder]) -> list[str]:
    """The categories that any of the folders has, sorted by name."""
    return sorted({name for folder in folders for name in folder.index.categories})


def training_corpus(folders: Sequence[Folder], data: DataConfig, labelled: bool) -> Corpus:
    """What an epoch of training sees. Raises ConfigError where nothing is left of a folder."""
    return Corpus([_training_part(folder, data, labelled) for folder in folders])


def _training_part(folder: Folder, data: DataConfig, labelled: bool) -> Part:
    chosen = _chosen(folder, data.split, labelled)
    if not chosen:
        raise _none_held([folder], data.split, labelled)
    kept = nested(chosen, data.fraction, folder.store.folder)
    return Part(folder.store, kept, folder.weight * data.samples_per_volume)


def held_out_corpus(folders: Sequence[Folder], split: str, labelled: bool) -> Corpus:
    """Every sample of a split once, whatever training sees of it. Raises ConfigError where no folder has one.

    A folder without the split is one to train on alone.
    """
    held = [(folder, _chosen(folder, split, labelled)) for folder in folders]
    parts = [Part(folder.store, chosen) for folder, chosen in held if chosen]
    if not parts:
        raise _none_held(folders, split, labelled)
    for folder, chosen in held:
        if not chosen:
            log.info(
                "%s holds nothing of %r: what is held out comes from the other folders", folder.store.folder, split
            )
    return Corpus(parts)


def _opened(store: Store, data: DataConfig) -> Index:
    """The folder's index; shards that are missing or cut are borne as far as the bound on damaged samples allows."""
    index = load_index(store)
    problems = size_problems(store, index)
    affected = sum(record.shard in problems for record in index.samples)
    if affected > data.max_bad_fraction * len(index.samples):
        raise ShardError(next(iter(problems.values())))
    for problem in problems.values():
        log.warning("%s; its samples are replaced by others where they cannot be read", problem)
    return index


def parse_weighted(entry: str) -> tuple[str, float]:
    """`DIR` or `WEIGHT*DIR`. Raises ConfigError for a weight that is no positive number."""
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


def _chosen(folder: Folder, split: str, labelled: bool) -> list[SampleRecord]:
    records = [record for record in folder.index.samples if split in ("all", record.split)]
    return [record for record in records if record.labelled or not labelled]


def _none_held(folders: Sequence[Folder], split: str, labelled: bool) -> ConfigError:
    kind = "labelled samples" if labelled else "samples"
    found = [
        f"{masked(str(folder.store.folder))} holds no {kind} in {split!r} (it has {folder.index.splits})"
        for folder in folders
    ]
    return ConfigError(f"data.split, data.val_split: {'; '.join(found)}")


def nested(records: Sequence[SampleRecord], fraction: float, folder: Source) -> list[SampleRecord]:
    """The share of the records whose content hashes lowest, at least one, in the records' order.

    Raises ConfigError where the index was written before it held the hashes.
    """
    if fraction == 1:
        return list(records)
    if any(not record.content for record in records):
        place = masked(str(folder))
        raise ConfigError(f"data.fraction: the index of {place} holds no content hashes: run segvol-pl index {place}")
    # The split is decided by the hash itself: hashed again, the subset does not depend on it.
    ranked = sorted(records, key=lambda record: hashlib.sha256(f"subset {record.content}".encode()).digest())
    kept = {record.key for record in ranked[: max(1, round(fraction * len(records)))]}
    return [record for record in records if record.key in kept]
