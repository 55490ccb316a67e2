"""The stream: which rank and worker loads which sample, and when.

1. `epoch_order`: the order of an epoch is a pure function of (seed, epoch).
2. `Plan.positions`: the positions in that order that a worker of a rank loads are a pure function of integers too.
   Micro-batch k, counted from the start of the run, goes to worker k mod num_workers of each rank, and each rank loads
   its share of it.
3. `Stream` reads, samples and collates them, epoch after epoch without end. A damaged sample is replaced by another
   one, chosen by its position alone, so that the batch count of each rank is unaffected. The batch records what was
   replaced.

The state is one integer: the number of samples seen so far over all ranks. Every rank and worker derives its part from
it, so that a run resumes exactly, in the middle of an epoch, with another number of GPUs.
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
"""Makes one training sample from the facts and members of a volume, with the sample's own rng."""

ATTEMPTS = 4
"""Samples tried for one position: the original and its replacements."""

DAMAGES = list(Damage)
"""In a batch, a kind of damage is an index into this list."""


@dataclass(frozen=True)
class World:
    """Rank and worker of a loader process. Passed explicitly, because loader processes cannot find it out reliably."""

    rank: int = 0
    num_ranks: int = 1
    worker: int = 0
    num_workers: int = 1


def epoch_order(num_samples: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """Return the order of an epoch: an int64 permutation of range(num_samples)."""
    return rng_of(seed, epoch).permutation(num_samples)


def _share(first: int, batch: int, world: World) -> np.ndarray:
    """The positions of the batch from `first` on that the rank loads: int64 (local batch,)."""
    if batch % world.num_ranks:
        raise ValueError(f"global batch {batch} is not a multiple of {world.num_ranks} ranks")
    local = batch // world.num_ranks
    return first + world.rank * local + np.arange(local, dtype=np.int64)


@dataclass(frozen=True)
class Plan:
    """The endless sequence of micro-batches, with `num_samples` positions per epoch."""

    num_samples: int
    global_batch: int
    accumulate: int = 1
    seed: int = 0
    last_batch: LastBatch = LastBatch.drop

    @property
    def usable(self) -> int:
        """Positions per epoch, a multiple of the global batch. With LastBatch.repeat, those past the last wrap around."""
        rest = self.num_samples % self.global_batch
        if self.last_batch is LastBatch.repeat and rest:
            return self.num_samples - rest + self.global_batch
        return self.num_samples - rest

    def positions(self, world: World, seen: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield the micro-batches of one worker.

        Args:
            world: Rank and worker.
            seen: Samples seen before, over all ranks.

        Yields:
            Epoch, samples seen after the micro-batch, and its positions.

        Raises:
            ValueError: The micro-batch is not a multiple of the number of ranks.
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

    Batches are packed for transport, see `batch.unpacked`. Each has `seen`: the samples seen by all ranks once it has
    been used.
    """

    def __init__(self, corpus: Corpus, draw: Draw, plan: Plan, world: World | None = None, seen: int = 0) -> None:
        self.corpus, self.draw = corpus, draw
        self.plan, self.world, self.seen = plan, world or World(), seen

    def worker_world(self) -> World:
        """Return the world with the id of this loader process."""
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
        """Return the rows of the corpus in the order of the epoch; a position is an index into it."""
        dealt = self.corpus.rows(self.plan.seed, epoch)
        rows: np.ndarray = dealt[epoch_order(self.plan.num_samples, self.plan.seed, epoch) % len(dealt)]
        return rows

    def sample(self, epoch: int, position: int, rows: np.ndarray) -> Arrays:
        """Return the sample at `position` of the epoch, sampled with its own rng.

        In the result, `row` is its index in the corpus, and `damaged_A2` lists what was replaced: (row, damage) for
        each attempt, -1 if it was not needed. Raises ShardError if `ATTEMPTS` samples in a row are damaged.
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
    """Stack the arrays of each name along a new first axis: hu_CDHW becomes hu_BCDHW."""
    names = {name: lettered(name, "B") for sample in samples for name in sample}
    return stacked(samples, names, {"seen": np.array(seen), **order_of(samples)})
