"""Shares of the corpus: properties over random worlds, in numbers only, and the stream over real shards."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from damaged import flip

from segvol_pl.config import DataConfig, LastBatch, PretrainConfig, RunConfig
from segvol_pl.data import cache, store
from segvol_pl.data.batch import unpacked
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import Corpus, Part, rng_of
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.locality import Locality, edges_of, epoch_order
from segvol_pl.data.sampling import Read
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.store import Store
from segvol_pl.data.stream import BatchPlan, Stream, World
from segvol_pl.errors import ConfigError
from segvol_pl.planning import node_cache
from segvol_pl.planning import plan as planner

WORLDS = 500


def test_the_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    order = epoch_order(1000, seed=3, epoch=5)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, epoch_order(1000, seed=3, epoch=5))
    assert not np.array_equal(order, epoch_order(1000, seed=3, epoch=6))
    assert not np.array_equal(order, epoch_order(1000, seed=4, epoch=5))


def test_a_share_of_the_order_is_permuted_within_itself() -> None:
    order, edges = epoch_order(1003, seed=3, epoch=5, shares=4), edges_of(1003, 4)
    for first, last in pairwise(edges):
        assert sorted(order[first:last]) == list(range(first, last)) != list(order[first:last])


# ---- random worlds ----


@dataclass(frozen=True)
class Case:
    """A random plan, an epoch, and a world that it fits."""

    plan: BatchPlan
    rows: np.ndarray
    """The rows of an epoch before they are shuffled."""
    epoch: int
    ranks: int
    workers: int

    @property
    def start(self) -> int:
        """Samples seen when the epoch begins."""
        return self.epoch * self.plan.usable

    @property
    def micros(self) -> int:
        """Micro-batches of an epoch."""
        return self.plan.usable // self.plan.global_batch * self.plan.accumulate

    def arranged(self, epoch: int) -> np.ndarray:
        return self.plan.locality.arranged(self.rows, self.plan.seed, epoch)

    def shares(self, epoch: int) -> list[np.ndarray]:
        """The rows of each share, sorted."""
        rows = self.arranged(epoch)
        return [np.sort(rows[first:last]) for first, last in pairwise(edges_of(len(rows), self.plan.locality.shares))]

    def placed(self, epoch: int) -> np.ndarray:
        """The row of each position."""
        rows, batch = self.arranged(epoch), self.plan.global_batch
        return np.array([self.plan.locality.place(position, batch, rows)[0] for position in range(self.plan.usable)])

    def dealt(self, rank: int, ranks: int, count: int) -> list[tuple[int, int, list[int]]]:
        """Epoch, samples seen and positions of the rank's next micro-batches."""
        taken = islice(self.plan.positions(World(rank, ranks), self.start), count)
        return [(epoch, seen, positions.tolist()) for epoch, seen, positions in taken]


def cases(copies: int = 1) -> Iterator[Case]:
    """As many random cases as there are WORLDS; ranks are a multiple of the shares."""
    rng = np.random.default_rng(22)
    for _ in range(WORLDS):
        shares, each = int(rng.choice([1, 2, 3, 4, 8])), int(rng.integers(1, 3))
        local, accumulate = int(rng.integers(1, 3)), int(rng.choice([1, 2]))
        batch = shares * each * local * accumulate
        volumes = -(-(batch * int(rng.integers(1, 4)) + int(rng.integers(0, batch))) // copies)
        plan = BatchPlan(
            *(volumes * copies, batch, accumulate, int(rng.integers(100))),
            last_batch=list(LastBatch)[rng.integers(2)],
            locality=Locality(shares, int(rng.integers(1, 5))),
        )
        rows = np.tile(np.arange(volumes), copies)
        yield Case(plan, rows, int(rng.integers(9)), shares * each, int(rng.integers(1, 4)))


def test_an_epoch_sees_each_row_once_over_all_ranks() -> None:
    for case in cases():
        plan, placed = case.plan, case.placed(case.epoch)
        dealt = [micro for rank in range(case.ranks) for micro in case.dealt(rank, case.ranks, case.micros)]
        assert {epoch for epoch, _, _ in dealt} == {case.epoch}
        taken = [placed[position] for _, _, positions in dealt for position in positions]
        times = np.bincount(taken, minlength=plan.num_samples)
        assert len(taken) == plan.usable
        if plan.last_batch is LastBatch.drop:
            assert times.max() == 1 and (times == 0).sum() == plan.num_samples - plan.usable
        else:
            assert times.min() == 1


def test_a_rank_reads_its_share_only_and_the_same_for_a_period() -> None:
    changed = divided = 0
    for case in cases():
        locality = case.plan.locality
        start = case.epoch - case.epoch % locality.epochs
        held = case.shares(start)
        for epoch in range(start, start + locality.epochs):
            assert all(np.array_equal(a, b) for a, b in zip(held, case.shares(epoch), strict=True))
        placed = case.placed(case.epoch)
        for rank in {0, case.ranks // 2, case.ranks - 1}:
            share = held[rank * locality.shares // case.ranks]
            for _, _, positions in case.dealt(rank, case.ranks, case.micros):
                assert np.isin(placed[positions], share).all()
        divided += locality.shares > 1
        changed += not np.array_equal(held[0], case.shares(start + locality.epochs)[0])
    # Few rows in two shares may be divided in the same way by chance.
    assert 0.9 * divided < changed <= divided


def test_any_world_that_divides_the_batch_sees_the_same_batches() -> None:
    """Also one that is no multiple of the shares: its ranks then read parts of several."""
    for case in cases():
        alone, micro = case.dealt(0, 1, 3), case.plan.global_batch // case.plan.accumulate
        for ranks in [count for count in range(2, micro + 1) if micro % count == 0]:
            parts = [case.dealt(rank, ranks, 3) for rank in range(ranks)]
            for number, (epoch, seen, positions) in enumerate(alone):
                got = [part[number] for part in parts]
                assert {one[:2] for one in got} == {(epoch, seen)}
                assert [position for one in got for position in one[2]] == positions


def test_accumulation_changes_no_position_of_a_step() -> None:
    for case in cases():
        accumulate, alone = case.plan.accumulate, replace(case, plan=replace(case.plan, accumulate=1))
        (step,) = alone.dealt(0, 1, 1)
        micros = case.dealt(0, 1, accumulate)
        assert {epoch for epoch, _, _ in micros} == {step[0]} and micros[-1][1] == step[1]
        assert sorted(position for _, _, positions in micros for position in positions) == step[2]


def test_a_run_resumes_at_any_micro_batch() -> None:
    rng = np.random.default_rng(1)
    for case in cases():
        micro, stop, rank = case.plan.global_batch // case.plan.accumulate, int(rng.integers(8)), case.ranks - 1
        workers = [World(rank, case.ranks, worker, case.workers) for worker in range(case.workers)]

        def taken(seen: int, count: int, case: Case = case, workers: list[World] = workers) -> list[object]:
            each = [case.plan.positions(world, seen) for world in workers]
            micros = [next(each[number % case.workers]) for number in range(count)]
            return [(epoch, after, positions.tolist()) for epoch, after, positions in micros]

        assert taken(0, stop + 3)[stop:] == taken(stop * micro, 3)


def test_copies_of_a_volume_are_in_one_share() -> None:
    """But for those at the edges of shares, whose sizes are equal."""
    for case in cases(copies=3):
        shares = case.shares(case.epoch)
        apart = np.bincount(np.concatenate([np.unique(share) for share in shares])) > 1
        assert apart.sum() <= 2 * (len(shares) - 1)
        assert np.array_equal(np.bincount(np.concatenate(shares)), np.full(len(apart), 3))


def test_one_share_is_one_permutation_of_the_corpus() -> None:
    """The order of a run without `data.locality`, to the digit."""
    for case in (case for case in cases() if case.plan.locality.shares == 1):
        plan, size = case.plan, case.plan.num_samples
        order = rng_of(plan.seed, case.epoch).permutation(size)
        assert np.array_equal(case.arranged(case.epoch), order)
        assert np.array_equal(case.placed(case.epoch), order[np.arange(plan.usable) % size])
        dealt = [position for _, _, positions in case.dealt(0, 1, case.micros) for position in positions]
        assert dealt == list(range(plan.usable))


def test_a_row_keeps_its_place_whichever_rows_an_epoch_has() -> None:
    """With a weight of 0.5 each epoch has other rows: a row stays in its share, but near an edge."""
    rows, locality = np.arange(4000), Locality(4, 100)
    whole = locality.arranged(rows, 1, 0)
    share_of = np.empty(4000, dtype=int)
    share_of[whole] = np.repeat(np.arange(4), 1000)
    for epoch in range(1, 5):
        half = np.sort(rng_of(9, epoch).permutation(rows)[:2000])
        assert np.mean(share_of[locality.arranged(half, 1, epoch)] == np.repeat(np.arange(4), 500)) > 0.9


def test_the_planner_counts_what_nodes_read() -> None:
    """Its caches hold what a cache would hold under the stream's own order."""
    assert (node_cache.KEPT_SHARE, planner.KEPT_OPEN) == (cache.KEPT_SHARE, store.KEPT_OPEN)
    nodes, epochs, samples = 8, 12, 8 * node_cache.PIECES
    for shares, period in ((1, 1), (8, 4), (4, 4), (12, 3), (16, 6)):
        plan = BatchPlan(samples, 48 if shares == 12 else 64, locality=Locality(shares, period))
        case, found, kept = Case(plan, np.arange(samples), 0, nodes, 1), [], dict[int, None]()
        for epoch in range(epochs):
            placed, hits = case.placed(epoch), 0
            read = [placed[p] for _, _, ps in replace(case, epoch=epoch).dealt(4, nodes, case.micros) for p in ps]
            for row in read:
                hits += row in kept
                kept.pop(row, None)
                kept[row] = None
                if len(kept) > 0.3 * samples * cache.KEPT_SHARE:
                    del kept[next(iter(kept))]
            found.append(hits / len(read))
        planned = node_cache.NodeCache(nodes, 0.3, shares, period).hits(epochs)
        assert np.mean(planned) == pytest.approx(np.mean(found), abs=0.05), shares


# ---- the stream over real shards ----


def _number(facts: Facts, read: Read, rng: np.random.Generator) -> Arrays:
    read({Member.OVERVIEW: slice(None)})
    return {"drawn": rng.random(3)}


def _stream(folder: Path, world: World | None = None, seen: int = 0) -> Stream:
    records = read_index(Store(folder)).samples
    plan = BatchPlan(4 * len(records), 8, 2, seed=7, locality=Locality(2, 3))
    return Stream(Corpus([Part(Store(folder), records, 4)]), _number, plan, world, seen)


def _rows(folder: Path, rank: int, count: int, seen: int = 0) -> list[list[int]]:
    return [unpacked(batch)["row_B"].tolist() for batch in islice(iter(_stream(folder, World(rank, 2), seen)), count)]


def test_ranks_read_their_shares_of_real_shards(phantom_shards: Path) -> None:
    stream = _stream(phantom_shards)
    epoch = stream.plan.usable // 4
    halves = [_rows(phantom_shards, rank, 3 * epoch) for rank in range(2)]
    own = [{row for batch in half for row in batch} for half in halves]
    # One volume at most lies on the edge of the two shares.
    assert len(own[0] & own[1]) <= 1 and own[0] | own[1] == set(range(stream.corpus.num_volumes))
    alone = list(islice(iter(stream), 3 * epoch))
    assert [unpacked(one)["row_B"].tolist() for one in alone] == [a + b for a, b in zip(*halves, strict=True)]
    assert _rows(phantom_shards, 1, 3, seen=4 * (epoch + 1)) == halves[1][epoch + 1 : epoch + 4]


def test_a_damaged_sample_is_replaced_from_its_share(phantom_shards: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(phantom_shards, tmp_path / "shards"))
    before = [_rows(broken, rank, 6) for rank in range(2)]
    (lost, *_) = sorted({row for batch in before[0] for row in batch} - {row for batch in before[1] for row in batch})
    flip(broken, _stream(broken).corpus.parts[0].records[lost], Member.OVERVIEW)
    after = [_rows(broken, rank, 6) for rank in range(2)]
    share = {row for batch in before[0] for row in batch} - {lost}
    assert after[1] == before[1]
    assert {row for batch in after[0] for row in batch} <= share


# ---- what is refused ----


def test_a_batch_that_shares_do_not_divide_is_refused() -> None:
    def config(**data: object) -> PretrainConfig:
        return PretrainConfig(data=DataConfig(**data), run=RunConfig(accumulate=2))  # type: ignore[arg-type]

    assert config(global_batch=32, locality=16).data.locality == 16
    with pytest.raises(
        ConfigError, match=r"data\.locality: 32 shares .*global_batch=32 must be a multiple of it x run"
    ):
        config(global_batch=32, locality=32)
    with pytest.raises(ValueError, match="micro-batch 4 is not a multiple of 3 shares"):
        next(BatchPlan(100, 8, 2, locality=Locality(3)).positions(World(), 0))


def test_a_pipe_has_no_shares() -> None:
    with pytest.raises(ConfigError, match=r"data\.locality: must be 1 with a pipe: source"):
        DataConfig(shards="pipe:cat {file}", locality=2)


def test_shares_that_do_not_fit_corpus_or_nodes_are_reported(
    phantom_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def module(nodes: int, **keys: object) -> VolumeModule:
        data = DataConfig(shards=str(phantom_shards), split="all", global_batch=24, **keys)  # type: ignore[arg-type]
        return VolumeModule(data, RunConfig(out="unused", nodes=nodes), _number, _number, labelled=False)

    with pytest.raises(ConfigError, match=r"data\.locality: an epoch of \d samples cannot be divided into 24 shares"):
        module(1, locality=24, last_batch=LastBatch.repeat)
    assert module(4, locality=2, samples_per_volume=9).plan.locality == Locality(2, 4)
    assert "data.locality" not in caplog.text
    with caplog.at_level(logging.WARNING):
        module(3, locality=2, samples_per_volume=9)
    assert "data.locality=2: some of the 3 nodes read parts of several shares" in caplog.text
