"""Order and assignment as properties over many worlds, and the stream over real shards."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from itertools import islice, takewhile
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch
from damaged import flip
from factories import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from segvol_pl.config import DataConfig, LastBatch, PromptConfig, RunConfig, StartMethod
from segvol_pl.data import sampling
from segvol_pl.data.batch import Batch, unpacked
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.damage import DAMAGES, Damage
from segvol_pl.data.damage_tally import DamageTally
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.index_builder import build_index, walk_shard
from segvol_pl.data.sampling import Read
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_sample
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.data.store import Store
from segvol_pl.data.stream import BatchPlan, Stream, World
from segvol_pl.errors import ShardError, StoreError


def dealt(plan: BatchPlan, world: World, seen: int, until: int) -> list[np.ndarray]:
    """The positions of each micro-batch that this worker loads between two numbers of samples seen."""
    taken = takewhile(lambda micro: micro[1] <= until, plan.positions(world, seen))
    return [positions for _, _, positions in taken]


worlds = st.tuples(st.integers(1, 16), st.integers(1, 6), st.integers(1, 4), st.integers(0, 200), st.integers(0, 5))


@given(worlds)
@settings(max_examples=200, deadline=None)
def test_every_position_is_loaded_once_by_some_worker(drawn: tuple[int, int, int, int, int]) -> None:
    ranks, workers, local, extra, skipped = drawn
    batch = ranks * local
    samples = batch * (skipped + 1) + extra
    start, plan = skipped * batch, BatchPlan(samples, batch)
    parts = [
        positions
        for rank in range(ranks)
        for worker in range(workers)
        for positions in dealt(plan, World(rank, ranks, worker, workers), start, plan.usable)
    ]
    whole = (samples - start) // batch * batch
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(start, start + whole))
    assert all(positions.shape == (local,) for positions in parts)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_the_samples_of_a_step_do_not_depend_on_the_world(ranks: int, workers: int, step: int) -> None:
    batch = 8 * 3 * 5 * 7
    samples = batch * 31
    if batch % ranks:
        return
    got = []
    for rank in range(ranks):
        mine = dealt(BatchPlan(samples, batch), World(rank, ranks, step % workers, workers), 0, samples)
        got.append(mine[step // workers])
    assert np.array_equal(np.sort(np.concatenate(got)), np.arange(step * batch, (step + 1) * batch))


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="micro-batch 8 is not a multiple of 3 ranks"):
        next(BatchPlan(100, 8).positions(World(0, 3), 0))


@given(st.integers(0, 40), st.integers(1, 4), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_a_plan_goes_on_where_it_stopped(step: int, workers: int, accumulate: int) -> None:
    plan = BatchPlan(num_samples=29, global_batch=8, accumulate=accumulate, seed=1)
    micro = 8 // accumulate

    def taken(seen: int, count: int) -> list[tuple[int, int, list[int]]]:
        each = [plan.positions(World(0, 1, worker, workers), seen) for worker in range(workers)]
        micros = [next(each[index % workers]) for index in range(count)]
        return [(epoch, after, list(positions)) for epoch, after, positions in micros]

    assert taken(0, step + 6)[step:] == taken(step * micro, 6)


def _stream(folder: Path, world: World | None = None, seen: int = 0, batch: int = 4) -> Stream:
    index = read_index(Store(folder))
    records = index.samples.labelled()
    rows = {name: row for row, name in enumerate(sorted(index.categories))}
    prompts = PromptConfig(categories_per_volume=2, pseudo_per_volume=2)
    draw = functools.partial(sampling.sample_segmentation, model=TINY, data=DataConfig(), prompts=prompts, row_of=rows)
    return Stream(
        Corpus([Part(Store(folder), records, 3)]), draw, BatchPlan(3 * len(records), batch, seed=7), world, seen
    )


def _equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_batches_have_the_promised_names_and_shapes(phantom_shards: Path) -> None:
    batch = unpacked(next(iter(_stream(phantom_shards))))
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes["image_BCDHW"] == (4, 1, 8, 16, 16)
    assert shapes["masks_BKDHW"] == shapes["pseudo_masks_BKDHW"] == (4, 2, 8, 16, 16)
    assert shapes["points_BKN3"] == (4, 2, 21, 3)
    assert shapes["labels_BKN"] == (4, 2, 21)
    assert shapes["boxes_BK6"] == (4, 2, 6)
    assert shapes["category_BK"] == shapes["valid_BK"] == (4, 2)
    assert batch["image_BCDHW"].dtype == torch.float32
    assert batch["masks_BKDHW"].dtype == batch["pseudo_masks_BKDHW"].dtype == torch.bool
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


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_any_world_sees_the_same_samples_in_every_step(data: st.DataObject) -> None:
    """Worlds of up to 1,024 ranks x 16 workers x 8 accumulation steps, in the middle of an epoch or beyond it."""
    ranks, workers = data.draw(st.integers(1, 1024)), data.draw(st.integers(1, 16))
    accumulate, local = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 3))
    batch = ranks * accumulate * local
    samples, tail = (
        batch * data.draw(st.integers(1, 5)) + data.draw(st.integers(0, batch - 1)),
        data.draw(st.sampled_from(LastBatch)),
    )
    plan, step = BatchPlan(samples, batch, accumulate, last_batch=tail), data.draw(st.integers(0, 12))
    steps_per_epoch = plan.usable // batch
    epoch, index = divmod(step, steps_per_epoch)
    rank, got = data.draw(st.integers(0, ranks - 1)), []
    for micro in range(accumulate):
        number = step * accumulate + micro
        stopped = data.draw(st.integers(max(0, number - 2 * workers), number))
        worker = (number - stopped) % workers
        micros = plan.positions(World(rank, ranks, worker, workers), stopped * (batch // accumulate))
        at, seen, positions = next(islice(micros, (number - stopped) // workers, None))
        assert (at, seen) == (epoch, (number + 1) * batch // accumulate)
        got.append(positions)
        first = index * batch + micro * ranks * local
        assert np.array_equal(positions, np.arange(first + rank * local, first + (rank + 1) * local))
    assert all(len(positions) == local for positions in got)


def test_an_epoch_sees_every_sample_once_but_for_its_tail() -> None:
    for tail, usable in ((LastBatch.drop, 24), (LastBatch.repeat, 32)):
        plan = BatchPlan(29, 8, last_batch=tail)
        positions = np.concatenate([next(islice(plan.positions(World(), 0), n, None))[2] for n in range(usable // 8)])
        assert np.array_equal(positions, np.arange(usable)) and plan.usable == usable


def test_a_repeated_tail_starts_the_epoch_anew(phantom_shards: Path) -> None:
    stream = _stream(phantom_shards, batch=4)
    stream.plan = replace(stream.plan, last_batch=LastBatch.repeat)
    assert stream.plan.num_samples == 18 and stream.plan.usable == 20
    rows = stream.rows(0)
    assert np.array_equal(np.bincount(rows), [3] * 6)
    last = list(islice(iter(stream), 5))[-1]
    assert last["hu_BCDHW"].shape[0] == 4 and int(last["seen"]) == 20


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_loader_processes_behave_alike_however_they_start(phantom_shards: Path, method: str) -> None:
    stream = _stream(phantom_shards, World(1, 2))
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert all(_equal(a, b) for a, b in zip(islice(iter(loader), 4), islice(iter(stream), 4), strict=True))


class OnManyCores:
    """A draw that says how many threads Blosc2 holds; a new process begins with as many as on a larger machine."""

    def __init__(self) -> None:
        self.threads = 4

    def __setstate__(self, state: dict[str, int]) -> None:
        blosc2.set_nthreads(state["threads"])

    def __call__(self, facts: Facts, read: Read, rng: np.random.Generator) -> Arrays:
        tasks = Path("/proc/self/task")
        read({Member.CT: sampling.ALL})
        held = len(list(tasks.iterdir()))
        blosc2.set_nthreads(1)
        return {"threads": np.array(held - len(list(tasks.iterdir())))}


@pytest.mark.parametrize("method", [StartMethod.fork, StartMethod.spawn])
def test_a_loader_process_decodes_with_one_thread(phantom_shards: Path, method: StartMethod) -> None:
    data = DataConfig(shards=str(phantom_shards), split="all", global_batch=2, workers=1, start_method=method)
    module = VolumeModule(data, RunConfig(out="unused"), OnManyCores(), OnManyCores(), labelled=True)
    ours = blosc2.set_nthreads(4)
    try:
        for loader in (module.train_dataloader(), module.val_dataloader()):
            assert next(iter(loader))["threads_B"].tolist() == [0, 0]
    finally:
        blosc2.set_nthreads(ours)


def _module(shards: Path, method: StartMethod) -> VolumeModule:
    data = DataConfig(shards=str(shards), split="all", global_batch=2, workers=1, start_method=method)
    draw = functools.partial(sampling.sample_simmim, model=TINY, mask_ratio=0.5, data=data)
    return VolumeModule(data, RunConfig(out="unused"), draw, draw, labelled=True)


def test_a_validation_uses_the_process_of_the_one_before_and_sees_the_same(phantom_shards: Path) -> None:
    loader = _module(phantom_shards, StartMethod.auto).val_dataloader()
    first, workers = next(iter(loader)), multiprocessing.active_children()
    second = next(iter(loader))
    assert workers and multiprocessing.active_children() == workers
    assert _equal(first, second)


@pytest.mark.parametrize(("device", "method"), [("cpu", "fork"), ("cuda:0", "forkserver")])
def test_processes_are_not_forked_from_one_that_has_threads_of_cuda(
    phantom_shards: Path, device: str, method: str
) -> None:
    module = _module(phantom_shards, StartMethod.auto)
    strategy = SimpleNamespace(root_device=torch.device(device))
    module.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    assert module._context().get_start_method() == method


def test_signals_to_all_processes_of_a_job_do_not_end_the_fork_server(phantom_shards: Path) -> None:
    """Nor those that it has forked, which would seem to have ended with it."""
    forkserver._forkserver._stop()  # the one that torch has started for an earlier test
    loader = iter(_module(phantom_shards, StartMethod.forkserver).train_dataloader())
    next(loader)
    server = forkserver._forkserver._forkserver_pid
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(server, number)
    time.sleep(0.5)
    assert os.waitpid(server, os.WNOHANG) == (0, 0), "the server lives"
    next(loader)


def test_the_fork_server_imports_once_what_loader_processes_need(phantom_shards: Path, tmp_path: Path) -> None:
    """They were handed functions of the DataModule's file: each of them imported it, and Lightning, by itself."""
    forkserver._forkserver._stop()
    context = _module(phantom_shards, StartMethod.forkserver)._context()
    said = tmp_path / "said"
    look = (
        f"import sys, pathlib; pathlib.Path({str(said)!r}).write_text(str('segvol_pl.data.datamodule' in sys.modules))"
    )
    process = context.Process(target=exec, args=(look,))  # type: ignore[attr-defined]
    process.start()
    process.join()
    assert said.read_text() == "True"


# ---- damage ----


@pytest.fixture
def broken(phantom_shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(phantom_shards, tmp_path / "shards"))


DAMAGED = {"altered": Member.OVERVIEW, "facts": Member.FACTS}


@pytest.mark.parametrize("what", [*DAMAGED, "missing", "short"])
def test_a_damaged_sample_is_replaced_alike_on_every_world(broken: Path, what: str) -> None:
    """Two ranks together still see what one sees; batches of whole samples do not change at all."""
    whole, stream, halves = _stream(broken), _stream(broken), [_stream(broken, World(rank, 2)) for rank in range(2)]
    before = list(islice(iter(whole), 4))
    record = stream.corpus.parts[0].records[1]
    if what in DAMAGED:
        flip(broken, record, DAMAGED[what])
    elif what == "missing":
        (broken / record.shard).unlink()
    else:
        os.truncate(broken / record.shard, record.members[Member.OVERVIEW.value][0] + 10)
    after = list(islice(iter(stream), 4))
    lost = {row for row, other in enumerate(stream.corpus.parts[0].records) if other.shard == record.shard}
    hit = [np.isin(batch["damaged_BA2"][..., 0], list(lost)).any(axis=1) for batch in after]
    assert any(row.any() for row in hit)
    for old, new, replaced in zip(before, after, hit, strict=True):
        assert torch.equal(old["hu_BCDHW"][~replaced], new["hu_BCDHW"][~replaced])
        assert new["hu_BCDHW"].shape == old["hu_BCDHW"].shape and int(new["seen"]) == int(old["seen"])
    parts = [next(iter(half))["hu_BCDHW"] for half in halves]
    assert torch.equal(after[0]["hu_BCDHW"], torch.cat(parts))
    causes = {Damage.ALTERED} if what in DAMAGED else {Damage[what.upper()]}
    said = {DAMAGES[int(code)] for batch in after for code in batch["damaged_BA2"][..., 1].flatten() if code >= 0}
    assert said == causes


def test_damage_is_counted_by_shard_and_cause_said_once_and_bounded(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = _stream(broken)
    health = DamageTally(stream.corpus)
    record = stream.corpus.parts[0].records[2]
    flip(broken, record, Member.FACTS)
    for batch in islice(iter(stream), 8):
        health.note(batch["damaged_BA2"].numpy())
    assert health.causes == {(record.shard, Damage.ALTERED): 1} and set(health.damaged) == {2}
    assert health.replaced > 1 and caplog.text.count(f"sample {record.key}") == 1
    health.check(bound=0.5)
    with pytest.raises(ShardError, match=rf"1 of 6 samples are damaged.*0\.1.*{record.shard}: 1 altered"):
        health.check(bound=0.1)


def test_a_chunk_that_cannot_be_decoded_is_damage_of_its_sample(broken: Path) -> None:
    """Without hashes nothing tells before the slice is decoded."""
    for path in sorted(broken.glob("*.tar")):
        samples = [read_sample(Store(broken), record) for record, _ in walk_shard(path)]
        bare = {one.key: json.loads(one.members[Member.FACTS]) | {"chunks": {}} for one in samples}
        for facts in bare.values():
            facts["members"] = dict.fromkeys(facts["members"], "")
        write_shard(
            path,
            [
                replace(one, members={**one.members, Member.FACTS: json.dumps(bare[one.key]).encode()})
                for one in samples
            ],
        )
    record = build_index(broken).samples[2]
    path, offset = broken / record.shard, record.members[Member.OVERVIEW.value][0]
    content = bytearray(path.read_bytes())
    content[offset + 216 : offset + 280] = b"\xff" * 64
    path.write_bytes(content)
    stream = _stream(broken)
    told = [batch["damaged_BA2"].reshape(-1, 2).tolist() for batch in islice(iter(stream), 8)]
    assert {tuple(one) for batch in told for one in batch} == {(-1, -1), (2, DAMAGES.index(Damage.UNREADABLE))}


def test_a_corpus_of_damage_ends_the_stream(broken: Path) -> None:
    stream = _stream(broken)
    for shard in broken.glob("*.tar"):
        shard.unlink()
    with pytest.raises(ShardError, match=r"4 samples in a row are damaged: run segvol-pl verify"):
        next(iter(stream))


def test_a_folder_that_is_away_is_no_damage(broken: Path) -> None:
    stream = _stream(broken)
    stream.corpus = Corpus([replace(part, store=Store(broken, retry_seconds=0.2)) for part in stream.corpus.parts])
    broken.rename(broken.with_name("away"))
    with pytest.raises(StoreError, match=r"could not be read for 0 s .*check that its folder is mounted"):
        next(iter(stream))
