"""The stream: which rank and worker loads which sample, and when.

1. `Locality.arranged`: the order of an epoch is a pure function of (seed, epoch).
2. `BatchPlan.positions`: the positions in that order that one worker of one rank loads, again a pure function of
   integers. Micro-batch k, counted from the run's start, goes to worker k mod num_workers of every rank, and each rank
   loads its part of it.
3. `Stream` reads, draws and collates them, epoch after epoch, without end. A damaged sample is replaced by another one,
   chosen from its position alone, so the number of batches does not change on any rank. The batch reports it.

The state is one integer: the samples seen so far over all ranks. Every rank and worker derives its part from it, so a
run resumes exactly, in the middle of an epoch, also on another number of GPUs.
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
from segvol_pl.data.damage import DAMAGES, DamagedSample
from segvol_pl.data.locality import ONE_SHARE, Locality
from segvol_pl.data.sampling import Read, lettered
from segvol_pl.data.schema import Facts
from segvol_pl.data.shard_reader import read_facts, read_slices
from segvol_pl.errors import ShardError

Draw = Callable[[Facts, Read, np.random.Generator], Arrays]
"""Makes one training sample from a volume's facts, its arrays and the sample's own rng."""

ATTEMPTS = 4
"""Samples tried for one position: the first one and its replacements."""


@dataclass(frozen=True)
class World:
    """The place of one loader process among all. Passed explicitly: a loader process cannot find it out reliably."""

    rank: int = 0
    num_ranks: int = 1
    worker: int = 0
    num_workers: int = 1


@dataclass(frozen=True)
class BatchPlan:
    """The endless sequence of micro-batches, over `num_samples` positions per epoch.

    Args:
        num_samples: positions of an epoch.
        global_batch: samples of an optimiser step, over all ranks.
        accumulate: micro-batches of a step.
        seed: decides the order of every epoch.
        last_batch: drop or complete an epoch's incomplete last batch.
        locality: the shares of the corpus that a global batch is composed of.
    """

    num_samples: int
    global_batch: int
    accumulate: int = 1
    seed: int = 0
    last_batch: LastBatch = LastBatch.drop
    locality: Locality = ONE_SHARE

    @property
    def usable(self) -> int:
        """Positions of an epoch that are used, a multiple of the global batch. Those beyond the samples repeat some."""
        rest = self.num_samples % self.global_batch
        if self.last_batch is LastBatch.repeat and rest:
            return self.num_samples - rest + self.global_batch
        return self.num_samples - rest

    @property
    def micro_batch(self) -> int:
        """Samples of a micro-batch, over all ranks."""
        return self.global_batch // self.accumulate

    def positions(self, world: World, seen: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """The micro-batches of one worker of one rank, without end.

        Args:
            world: the worker's place.
            seen: samples seen before, over all ranks.

        Returns:
            Tuples of epoch, samples seen after the micro-batch, and its positions, int64 (local batch,).

        Raises:
            ValueError: the micro-batch is not a multiple of the ranks, or not of the shares.
        """
        micro = self._shared(world)
        per_epoch = self.usable // micro
        batch = seen // micro + world.worker
        while True:
            epoch, index = divmod(batch, per_epoch)
            yield epoch, (batch + 1) * micro, self._local(index, micro, world)
            batch += world.num_workers

    def epoch_positions(self, world: World) -> np.ndarray:
        """The positions of a rank in an epoch, of all its workers: int64 (micro-batches, local batch).

        Raises ValueError as `positions`.
        """
        micro = self._shared(world)
        return self._local(np.arange(self.usable // micro)[:, None], micro, world)

    def _shared(self, world: World) -> int:
        """Samples of a micro-batch over all ranks. Raises ValueError if ranks or shares do not divide it."""
        micro = self.micro_batch
        for count, name in ((world.num_ranks, "ranks"), (self.locality.shares, "shares")):
            if micro % count:
                raise ValueError(f"micro-batch {micro} is not a multiple of {count} {name}")
        return micro

    def _local(self, index: int | np.ndarray, micro: int, world: World) -> np.ndarray:
        """The rank's positions of the epoch's micro-batch `index`: int64 (local batch,); of an (n,1): (n, local)."""
        local, shares = micro // world.num_ranks, self.locality.shares
        # A global batch lies share after share, so does each of its micro-batches: accumulation changes no position.
        step, part = divmod(index, self.accumulate)
        share, number = np.divmod(world.rank * local + np.arange(local, dtype=np.int64), micro // shares)
        return step * self.global_batch + share * (self.global_batch // shares) + part * (micro // shares) + number


class Stream(IterableDataset[Batch]):
    """Collated micro-batches of one rank. Wrap in a DataLoader with `batch_size=None, collate_fn=identity_collate`.

    Batches are packed for transfer, see `batch.unpacked`. Each holds `seen`, the samples seen by all ranks after it.

    Args:
        corpus: the samples to read.
        draw: makes a training sample of a volume.
        plan: which positions form which batch.
        world: this rank's place; a single rank if None. The worker's place is found when iteration starts.
        seen: samples seen before, over all ranks.

    Raises:
        ShardError: while iterating, if several samples in a row are damaged.
        StoreError: while iterating, if the shards cannot be read.
    """

    def __init__(self, corpus: Corpus, draw: Draw, plan: BatchPlan, world: World | None = None, seen: int = 0) -> None:
        self.corpus, self.draw = corpus, draw
        self.plan, self.world, self.seen = plan, world or World(), seen

    def worker_world(self) -> World:
        """The place of this loader process."""
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
        """The corpus's rows in the epoch's order; `Locality.place` finds those of a position."""
        dealt = np.resize(self.corpus.rows(self.plan.seed, epoch), self.plan.num_samples)
        return self.plan.locality.arranged(dealt, self.plan.seed, epoch)

    def sample(self, epoch: int, position: int, rows: np.ndarray) -> Arrays:
        """Draw one sample with its own rng.

        Args:
            epoch: counted from 0.
            position: in the epoch's order.
            rows: the epoch's order, see `rows`.

        Returns:
            The sample's arrays; `row`, its row in the corpus; `damaged_A2`, (row, damage) of each replaced sample, -1
            for none.

        Raises:
            ShardError: `ATTEMPTS` samples in a row are damaged.
        """
        damaged_A2 = np.full((ATTEMPTS, 2), -1, dtype=np.int64)
        row, candidates = self.plan.locality.place(position, self.plan.global_batch, rows)
        key = [self.plan.seed, epoch, position]
        for attempt in range(ATTEMPTS):
            try:
                return {**self._drawn(row, rng_of(*key)), "damaged_A2": damaged_A2, "row": np.array(row)}
            except DamagedSample as error:
                damaged_A2[attempt] = row, DAMAGES.index(error.damage)
                last = error
            untried = np.setdiff1d(candidates, damaged_A2[:, 0])
            if not len(untried):
                break
            key = [self.plan.seed, epoch, position, attempt + 1]
            row = int(rng_of(*key).choice(untried))
        raise ShardError(f"{attempt + 1} samples in a row are damaged: run segvol-pl verify; the last: {last}")

    def _drawn(self, row: int, rng: np.random.Generator) -> Arrays:
        store, record = self.corpus.located(row)
        facts = read_facts(store, record)
        return self.draw(facts, lambda wanted: read_slices(store, record, facts, wanted), rng)


def collate(samples: list[Arrays], seen: int) -> Batch:
    """Stack the arrays of each name along a new first axis: hu_CDHW becomes hu_BCDHW."""
    names = {name: lettered(name, "B") for sample in samples for name in sample}
    return stacked(samples, names, {"seen": np.array(seen), **order_of(samples)})
