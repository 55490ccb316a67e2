"""The stream of a source that cannot seek (`pipe:COMMAND {file}`), read with webdataset from front to back.

1. In every pass the shards are shuffled and divided among the loader processes of all ranks.
2. Each process reads its shards in turn, checks every member against its hash, and shuffles in a buffer.
3. Samples are drawn, collated and counted as in `stream`. Damaged ones are left out and reported in the next batches.

The guarantees are weaker than those of `stream`: the order depends on the number of ranks and workers; the passes of
ranks drift apart; a resumed run begins a new pass, so samples of the interrupted pass may come twice or not at all;
with fewer shards than loader processes, several processes read the same shard. Every rank still gets as many batches.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import webdataset

from segvol_pl.data.batch import Batch
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import Corpus, rng_of
from segvol_pl.data.damage import DAMAGES, Damage, DamagedSample
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_reader import array_of, arrays_of, facts_of
from segvol_pl.data.stream import ATTEMPTS, BatchPlan, Draw, Stream, World, collate
from segvol_pl.errors import ShardError
from segvol_pl.imaging.transforms import Sliceable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipedSample:
    """A sample as read from the pipe."""

    row: int
    members: dict[str, bytes]
    copy: int = 0
    """Number of this draw, of those made from it in a pass."""


def shards_of(shards: list[str], world: World, rng: np.random.Generator) -> list[str]:
    """The shards that this worker reads in a pass, at least one. `rng` must be the same for every worker."""
    order = [shards[number] for number in rng.permutation(len(shards))]
    worker = world.rank * world.num_workers + world.worker
    return order[worker :: world.num_ranks * world.num_workers] or [order[worker % len(order)]]


class PipeStream(Stream):
    """Collated micro-batches of one rank, as `Stream`. buffer: volumes held to shuffle."""

    def __init__(
        self, corpus: Corpus, draw: Draw, plan: BatchPlan, world: World | None = None, seen: int = 0, buffer: int = 16
    ) -> None:
        super().__init__(corpus, draw, plan, world, seen)
        (self.part,) = corpus.parts
        self.buffer = buffer
        self.row_of = {record.key: row for row, record in enumerate(self.part.records)}
        self.shards = sorted({record.shard for record in self.part.records})
        self.damaged: deque[tuple[int, Damage]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        world = self.worker_world()
        samples = self._samples(world)
        for _, seen, positions in self.plan.positions(world, self.seen):
            yield collate(list(itertools.islice(samples, len(positions))), seen)

    def _samples(self, world: World) -> Iterator[Arrays]:
        for number in itertools.count():
            key, before = (self.plan.seed, self.seen, number), len(self.damaged)
            drawn = 0
            for sample in self._pass(world, key):
                drawn += 1
                yield sample
            if not drawn:
                found = ", ".join(sorted({damage.value for _, damage in list(self.damaged)[before:]})) or "empty"
                raise ShardError(
                    f"{self.part.store.folder}: a complete pass gave no usable sample ({found}): "
                    "run segvol-pl verify where the shards lie"
                )

    def _pass(self, world: World, key: tuple[int, int, int]) -> Iterator[Arrays]:
        shards = shards_of(self.shards, world, rng_of(*key))
        own = rng_of(*key, world.rank, world.worker)
        volumes = (copy for shard in shards for volume in self._volumes(shard) for copy in self._copies(volume, own))
        shuffled = webdataset.shuffle(self.buffer, initial=self.buffer, rng=random.Random(int(own.integers(2**63))))
        for volume in shuffled(volumes):
            try:
                sample = self._draw(volume, rng_of(*key, world.rank, world.worker, volume.row, volume.copy))
            except DamagedSample as error:
                self.damaged.append((volume.row, error.damage))
            else:
                yield {**sample, "damaged_A2": self._unreported(), "row": np.array(volume.row)}

    def _copies(self, volume: PipedSample, rng: np.random.Generator) -> Iterator[PipedSample]:
        """The volume as often as a pass draws from it; a fractional part is drawn by chance."""
        count = int(self.part.times) + int(rng.random() < self.part.times % 1)
        return (PipedSample(volume.row, volume.members, copy) for copy in range(count))

    def _volumes(self, shard: str) -> Iterator[PipedSample]:
        """The chosen samples of a shard. Those that the index lists and the shard lacks are noted as damaged."""
        missing = {record.key for record in self.part.records if record.shard == shard}
        place = self.part.store.place(shard)

        def warn(error: Exception) -> bool:
            log.warning("shard %s: %s: its further samples are left out of this pass", place, error.args[0])
            return True

        for sample in webdataset.tarfile_samples([{"url": place}], handler=warn):
            if sample["__key__"] in missing:
                missing.discard(sample["__key__"])
                members = {ending: sample[ending] for ending in sample if not ending.startswith("__")}
                yield PipedSample(self.row_of[sample["__key__"]], members)
        self.damaged.extend((self.row_of[key], Damage.MISSING) for key in sorted(missing))

    def _draw(self, volume: PipedSample, rng: np.random.Generator) -> Arrays:
        store, record = self.corpus.located(volume.row)
        place = f"shard {store.place(record.shard)}, sample {record.key}"

        def content(member: Member) -> bytes:
            if member.value not in volume.members:
                raise DamagedSample(f"{place}: {member.value} is not there", Damage.MISSING)
            return volume.members[member.value]

        @functools.cache
        def array(member: Member) -> Sliceable:
            return array_of(content(member), facts, member, f"{place}: {member.value}")

        facts = facts_of(content(Member.FACTS), record, store.place(record.shard))
        for member in arrays_of(facts, volume.members):
            array(member)  # check all against their hashes, whichever the draw reads
        return self.draw(facts, lambda wanted: {one: array(one)[slices] for one, slices in wanted.items()}, rng)

    def _unreported(self) -> np.ndarray:
        """(row, damage) of samples left out and not yet reported, in the form of `Stream.sample`."""
        damaged_A2 = np.full((ATTEMPTS, 2), -1, dtype=np.int64)
        for attempt in range(min(ATTEMPTS, len(self.damaged))):
            row, damage = self.damaged.popleft()
            damaged_A2[attempt] = row, DAMAGES.index(damage)
        return damaged_A2
