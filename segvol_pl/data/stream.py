"""The stream: which rank and worker loads which sample, and when.

1. `epoch_order`: the order of an epoch is a pure function of (seed, epoch).
2. `assign`: which positions of it a worker of a rank loads, a pure function of integers too.
3. `Stream` reads, draws and collates them, endlessly, epoch after epoch.

The state is one integer: the samples seen so far over all ranks. Every rank and worker of any world derives its
part from it, so that a run resumes exactly, in the middle of an epoch, with another number of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from segvol_pl.data.sample import Facts
from segvol_pl.data.shards import SampleRecord, Source, decode_array, read_facts, read_member
from segvol_pl.data.views import Arrays, Read, lettered

Draw = Callable[[Facts, Read, np.random.Generator], Arrays]
"""Makes one training sample from a volume's facts, its members and the sample's own rng."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class World:
    """Who is asking: passed explicitly, because loader processes cannot be trusted to find out."""

    rank: int = 0
    num_ranks: int = 1
    worker: int = 0
    num_workers: int = 1


def epoch_order(num_samples: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """int64 permutation of range(num_samples)."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return rng.permutation(num_samples)


def assign(num_samples: int, global_batch: int, world: World, start: int = 0) -> np.ndarray:
    """Positions in the epoch's order that this worker loads: int64 (batches, local batch).

    `start` is the number of samples already seen in the epoch. Batch k of a rank, counted from the epoch's start,
    goes to its worker k mod num_workers, so that a resumed epoch deals its batches as the uninterrupted one does.
    The last incomplete global batch is left out. Raises ValueError where the ranks do not divide the global batch.
    """
    if global_batch % world.num_ranks:
        raise ValueError(f"global batch {global_batch} is not a multiple of {world.num_ranks} ranks")
    local = global_batch // world.num_ranks
    batches = (num_samples - start) // global_batch
    mine = np.arange(world.worker, batches, world.num_workers, dtype=np.int64)
    first = start + mine * global_batch + world.rank * local
    return first[:, None] + np.arange(local, dtype=np.int64)


@dataclass(frozen=True)
class Plan:
    """The endless sequence of micro-batches over `num_samples` positions a epoch."""

    num_samples: int
    global_batch: int
    accumulate: int = 1
    seed: int = 0

    @property
    def usable(self) -> int:
        """Positions of an epoch that are seen: whole global batches only."""
        return self.num_samples - self.num_samples % self.global_batch

    def positions(self, world: World, seen: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, samples seen after the micro-batch, its positions) for this worker, from `seen` samples on."""
        micro = self.global_batch // self.accumulate
        per_epoch = self.usable // micro
        batch = seen // micro + world.worker
        while True:
            epoch, index = divmod(batch, per_epoch)
            alone = World(world.rank, world.num_ranks)
            yield epoch, (batch + 1) * micro, assign(self.usable, micro, alone, start=index * micro)[0]
            batch += world.num_workers


class Stream(IterableDataset[Batch]):
    """Collated micro-batches of one rank. Wrap in a DataLoader with `batch_size=None`.

    Each batch carries `seen`: the samples seen by all ranks once it has been used.
    """

    def __init__(
        self,
        folder: Source,
        records: list[SampleRecord],
        draw: Draw,
        plan: Plan,
        world: World | None = None,
        seen: int = 0,
    ) -> None:
        self.folder, self.records, self.draw = folder, records, draw
        self.plan, self.world, self.seen = plan, world or World(), seen

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        own, of = (worker.id, worker.num_workers) if worker else (0, 1)
        world = World(self.world.rank, self.world.num_ranks, own, of)
        order: dict[int, np.ndarray] = {}
        for epoch, seen, positions in self.plan.positions(world, self.seen):
            if epoch not in order:
                order = {epoch: epoch_order(self.plan.num_samples, self.plan.seed, epoch)}
            samples = [self.sample(epoch, int(position), int(order[epoch][position])) for position in positions]
            yield {**collate(samples), "seen": torch.tensor(seen)}

    def sample(self, epoch: int, position: int, entry: int) -> Arrays:
        """The sample at `position` of the epoch's order, drawn with its own rng."""
        record = self.records[entry % len(self.records)]
        seed = np.random.SeedSequence([self.plan.seed, epoch, position])
        rng = np.random.Generator(np.random.PCG64(seed))
        return self.draw(read_facts(self.folder, record), self._reader(record), rng)

    def _reader(self, record: SampleRecord) -> Read:
        return lambda member: decode_array(read_member(self.folder, record, member))


def collate(samples: list[Arrays]) -> Batch:
    """Stacks the arrays of each name along a new first axis: image_CDHW becomes image_BCDHW."""
    return {
        lettered(name, "B"): torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]
    }
