"""The stream: which rank and worker loads which sample, and when.

1. `epoch_order`: the order of an epoch is a pure function of (seed, epoch).
2. `Plan.positions`: which positions of it a worker of a rank loads, a pure function of integers too: micro-batch k,
   counted from the run's start, goes to worker k mod num_workers of each rank, and each rank loads its share of it.
3. `Stream` reads, draws and collates them, endlessly, epoch after epoch. A damaged sample is replaced by another one,
   decided by its position alone, so that every rank keeps its number of batches; the batch says what was replaced.

The state is one integer: the samples seen so far over all ranks. Every rank and worker of any world derives its
part from it, so that a run resumes exactly, in the middle of an epoch, with another number of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from segvol_pl.config import LastBatch
from segvol_pl.data.batch import Batch, order_of
from segvol_pl.data.collate import Arrays, stacked
from segvol_pl.data.corpus import Corpus, rng_of
from segvol_pl.data.damage import Damage, DamagedSample
from segvol_pl.data.sampling import Read, lettered
from segvol_pl.data.schema import Facts
from segvol_pl.data.shard_reader import read_array, read_facts
from segvol_pl.errors import ShardError

Draw = Callable[[Facts, Read, np.random.Generator], Arrays]
"""Makes one training sample from a volume's facts, its members and the sample's own rng."""

ATTEMPTS = 4
"""Samples tried for one position: the one in its place and its replacements."""

DAMAGES = list(Damage)
"""A batch says by number what was wrong."""


@dataclass(frozen=True)
class World:
    """Who is asking: passed explicitly, because loader processes cannot be trusted to find out."""

    rank: int = 0
    num_ranks: int = 1
    worker: int = 0
    num_workers: int = 1


def epoch_order(num_samples: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """int64 permutation of range(num_samples)."""
    return rng_of(seed, epoch).permutation(num_samples)


def _share(first: int, batch: int, world: World) -> np.ndarray:
    """The rank's positions of the batch that begins at `first`: int64 (local batch,)."""
    if batch % world.num_ranks:
        raise ValueError(f"global batch {batch} is not a multiple of {world.num_ranks} ranks")
    local = batch // world.num_ranks
    return first + world.rank * local + np.arange(local, dtype=np.int64)


@dataclass(frozen=True)
class Plan:
    """The endless sequence of micro-batches over `num_samples` positions a epoch."""

    num_samples: int
    global_batch: int
    accumulate: int = 1
    seed: int = 0
    last_batch: LastBatch = LastBatch.drop

    @property
    def usable(self) -> int:
        """Positions of an epoch that are seen, whole global batches only; those beyond the last start anew."""
        rest = self.num_samples % self.global_batch
        if self.last_batch is LastBatch.repeat and rest:
            return self.num_samples - rest + self.global_batch
        return self.num_samples - rest

    def positions(self, world: World, seen: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, samples seen after the micro-batch, its positions) for this worker, from `seen` samples on.

        Raises ValueError where the ranks do not divide the micro-batch.
        """
        micro = self.global_batch // self.accumulate
        per_epoch = self.usable // micro
        batch = seen // micro + world.worker
        while True:
            epoch, index = divmod(batch, per_epoch)
            yield epoch, (batch + 1) * micro, _share(index * micro, micro, world)
            batch += world.num_workers


class Stream(IterableDataset[Batch]):
    """Collated micro-batches of one rank. Wrap in a DataLoader with `batch_size=None, collate_fn=identity_collate`.

    Batches are in the form in which they travel, see `batch.unpacked`; each carries `seen`: the samples seen by all
    ranks once it has been used.
    """

    def __init__(self, corpus: Corpus, draw: Draw, plan: Plan, world: World | None = None, seen: int = 0) -> None:
        self.corpus, self.draw = corpus, draw
        self.plan, self.world, self.seen = plan, world or World(), seen

    def worker_world(self) -> World:
        """The world as this loader process stands in it."""
        worker = get_worker_info()
        own, of = (worker.id, worker.num_workers) if worker else (0, 1)
        return World(self.world.rank, self.world.num_ranks, own, of)

    def __iter__(self) -> Iterator[Batch]:
        rows: dict[int, np.ndarray] = {}
        for epoch, seen, positions in self.plan.positions(self.worker_world(), self.seen):
            if epoch not in rows:
                rows = {epoch: self.rows(epoch)}
            samples = [self.sample(epoch, int(position), rows[epoch]) for position in positions]
            yield collate(samples, seen)

    def rows(self, epoch: int) -> np.ndarray:
        """The corpus's rows in the epoch's order; positions are places in it."""
        dealt = self.corpus.rows(self.plan.seed, epoch)
        rows: np.ndarray = dealt[epoch_order(self.plan.num_samples, self.plan.seed, epoch) % len(dealt)]
        return rows

    def sample(self, epoch: int, position: int, rows: np.ndarray) -> Arrays:
        """The sample at `position` of the epoch, drawn with its own rng.

        `row` is its place in the corpus; `damaged_A2` says what was replaced: (row, damage) for each attempt, -1 where
        there was none. Raises ShardError where `ATTEMPTS` samples in a row are damaged.
        """
        damaged_A2 = np.full((ATTEMPTS, 2), -1, dtype=np.int64)
        row, key = int(rows[position % len(rows)]), [self.plan.seed, epoch, position]
        for attempt in range(ATTEMPTS):
            try:
                return {**self._drawn(row, rng_of(*key)), "damaged_A2": damaged_A2, "row": np.array(row)}
            except DamagedSample as error:
                damaged_A2[attempt] = row, DAMAGES.index(error.damage)
                last = error
            untried = np.setdiff1d(rows, damaged_A2[:, 0])
            if not len(untried):
                break
            key = [self.plan.seed, epoch, position, attempt + 1]
            row = int(rng_of(*key).choice(untried))
        raise ShardError(f"{attempt + 1} samples in a row are damaged: run segvol-pl verify; the last: {last}")

    def _drawn(self, row: int, rng: np.random.Generator) -> Arrays:
        store, record = self.corpus.located(row)
        facts = read_facts(store, record)
        return self.draw(facts, lambda member: read_array(store, record, facts, member), rng)


def collate(samples: list[Arrays], seen: int) -> Batch:
    """Stacks the arrays of each name along a new first axis: hu_CDHW becomes hu_BCDHW."""
    names = {name: lettered(name, "B") for sample in samples for name in sample}
    return stacked(samples, names, {"seen": np.array(seen), **order_of(samples)})
