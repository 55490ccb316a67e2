"""Order and assignment as properties over many worlds, and the stream over real shards."""

from __future__ import annotations

import functools
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from segvol_pl.config import DataConfig, PromptConfig, SegVolConfig
from segvol_pl.data import views
from segvol_pl.data.shards import read_index
from segvol_pl.data.stream import Batch, Plan, Stream, World, assign, epoch_order

MODEL = SegVolConfig(input_shape=[8, 16, 16], patch=[4, 8, 8], hidden=16, heads=2, decoder_heads=2)


def test_the_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    order = epoch_order(1000, seed=3, epoch=5)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, epoch_order(1000, seed=3, epoch=5))
    assert not np.array_equal(order, epoch_order(1000, seed=3, epoch=6))
    assert not np.array_equal(order, epoch_order(1000, seed=4, epoch=5))


worlds = st.tuples(st.integers(1, 16), st.integers(1, 6), st.integers(1, 4), st.integers(0, 200), st.integers(0, 5))


@given(worlds)
@settings(max_examples=200, deadline=None)
def test_every_position_is_loaded_once_by_some_worker(drawn: tuple[int, int, int, int, int]) -> None:
    ranks, workers, local, extra, skipped = drawn
    batch = ranks * local
    samples = batch * (skipped + 1) + extra
    start = skipped * batch
    parts = [
        assign(samples, batch, World(rank, ranks, worker, workers), start)
        for rank in range(ranks)
        for worker in range(workers)
    ]
    loaded = np.sort(np.concatenate([part.reshape(-1) for part in parts]))
    whole = (samples - start) // batch * batch
    assert np.array_equal(loaded, np.arange(start, start + whole))
    assert all(part.shape[1] == local for part in parts)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_the_samples_of_a_step_do_not_depend_on_the_world(ranks: int, workers: int, step: int) -> None:
    batch = 8 * 3 * 5 * 7
    samples = batch * 31
    if batch % ranks:
        return
    got = []
    for rank in range(ranks):
        mine = assign(samples, batch, World(rank, ranks, step % workers, workers))
        got.append(mine[step // workers])
    assert np.array_equal(np.sort(np.concatenate(got)), np.arange(step * batch, (step + 1) * batch))


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="global batch 8 is not a multiple of 3 ranks"):
        assign(100, 8, World(0, 3))


@given(st.integers(0, 40), st.integers(1, 4), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_a_plan_goes_on_where_it_stopped(step: int, workers: int, accumulate: int) -> None:
    plan = Plan(num_samples=29, global_batch=8, accumulate=accumulate, seed=1)
    micro = 8 // accumulate

    def dealt(seen: int, count: int) -> list[tuple[int, int, list[int]]]:
        each = [plan.positions(World(0, 1, worker, workers), seen) for worker in range(workers)]
        taken = [next(each[index % workers]) for index in range(count)]
        return [(epoch, after, list(positions)) for epoch, after, positions in taken]

    assert dealt(0, step + 6)[step:] == dealt(step * micro, 6)


def _stream(folder: Path, world: World | None = None, seen: int = 0, batch: int = 4) -> Stream:
    index = read_index(folder)
    records = [record for record in index.samples if record.labelled]
    rows = {name: row for row, name in enumerate(sorted(index.categories))}
    prompts = PromptConfig(categories_per_volume=2, pseudo_per_volume=2)
    draw = functools.partial(views.draw_segment, model=MODEL, data=DataConfig(), prompts=prompts, row_of=rows)
    return Stream(folder, records, draw, Plan(3 * len(records), batch, seed=7), world, seen)


def _equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_batches_have_the_promised_names_and_shapes(phantom_shards: Path) -> None:
    batch = next(iter(_stream(phantom_shards)))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes["image_BCDHW"] == (4, 1, 8, 16, 16)
    assert shapes["masks_BKDHW"] == shapes["pseudo_masks_BKDHW"] == (4, 2, 8, 16, 16)
    assert shapes["points_BKN3"] == (4, 2, 21, 3)
    assert shapes["labels_BKN"] == (4, 2, 21)
    assert shapes["boxes_BK6"] == (4, 2, 6)
    assert shapes["category_BK"] == shapes["valid_BK"] == (4, 2)
    assert batch["image_BCDHW"].dtype == torch.float32
    assert int(batch["seen"]) == 4


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_a_stop_change_no_batch(phantom_shards: Path, workers: int) -> None:
    alone = list(islice(iter(_stream(phantom_shards)), 6))
    loader = DataLoader(_stream(phantom_shards), batch_size=None, num_workers=workers)
    assert all(_equal(a, b) for a, b in zip(alone, islice(iter(loader), 6), strict=True))
    resumed = DataLoader(_stream(phantom_shards, seen=12), batch_size=None, num_workers=workers)
    assert all(_equal(a, b) for a, b in zip(alone[3:], islice(iter(resumed), 3), strict=True))


def test_two_ranks_together_see_what_one_sees(phantom_shards: Path) -> None:
    one = next(iter(_stream(phantom_shards)))
    halves = [next(iter(_stream(phantom_shards, World(rank, 2)))) for rank in range(2)]
    for name in one:
        if name != "seen":
            assert torch.equal(one[name], torch.cat([half[name] for half in halves]))


def test_spawned_workers_know_their_rank(phantom_shards: Path) -> None:
    stream = _stream(phantom_shards, World(1, 2))
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert _equal(next(iter(loader)), next(iter(stream)))
