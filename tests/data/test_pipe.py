"""Shards that come through a pipe: read in order, checked, as many batches for every rank."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged import flip
from factories import TINY, pipe_corpus
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from segvol_pl.config import DataConfig, PromptConfig
from segvol_pl.data import sampling
from segvol_pl.data.batch import unpacked
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import Corpus, open_folders, rng_of
from segvol_pl.data.damage_tally import DamageTally
from segvol_pl.data.pipe import PipeStream, shards_of
from segvol_pl.data.sampling import Read
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.stream import BatchPlan, World
from segvol_pl.errors import ConfigError, ShardError


def _key(facts: Facts, read: Read, rng: np.random.Generator) -> Arrays:
    """Which volume it was, and a draw: enough to tell samples apart."""
    return {"key": np.array(int(facts.key[-3:])), "draw": np.array(rng.random())}


def _stream(corpus: Corpus, world: World | None = None, seen: int = 0, batch: int = 2) -> PipeStream:
    return PipeStream(corpus, _key, BatchPlan(corpus.num_samples, batch, seed=3), world, seen, buffer=4)


def _keys(stream: PipeStream, batches: int, workers: int = 0) -> list[int]:
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    return [int(key) for batch in islice(iter(loader), batches) for key in batch["key_B"]]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 5))
def test_the_shards_of_a_pass_are_dealt_once_and_every_worker_has_some(
    count: int, ranks: int, workers: int, number: int
) -> None:
    shards = [f"{index}.tar" for index in range(count)]
    worlds = [World(rank, ranks, worker, workers) for rank in range(ranks) for worker in range(workers)]
    dealt = [shards_of(shards, world, rng_of(0, number)) for world in worlds]
    assert all(dealt)
    read = Counter(shard for own in dealt for shard in own)
    assert set(read) == set(shards)
    assert max(read.values()) == 1 or count < len(worlds)


def test_a_pass_of_one_reader_gives_every_sample_once(phantom_shards: Path) -> None:
    corpus = pipe_corpus(phantom_shards, times=2)
    keys = _keys(_stream(corpus), 6)
    assert Counter(keys) == dict.fromkeys(range(6), 2)


def test_it_is_the_same_every_time_and_another_after_a_stop(phantom_shards: Path) -> None:
    corpus = pipe_corpus(phantom_shards)
    first, second = (list(islice(iter(_stream(corpus)), 9)) for _ in range(2))
    assert all(torch.equal(a["draw_B"], b["draw_B"]) for a, b in zip(first, second, strict=True))
    later = list(islice(iter(_stream(corpus, seen=6)), 3))
    assert [int(batch["seen"]) for batch in later] == [int(batch["seen"]) for batch in first[3:6]] == [8, 10, 12]
    assert not any(torch.equal(a["draw_B"], b["draw_B"]) for a, b in zip(first[3:6], later, strict=True))


def test_every_rank_gets_its_batches_though_there_are_fewer_shards(phantom_shards: Path) -> None:
    for rank in range(8):
        keys = _keys(_stream(pipe_corpus(phantom_shards, times=4), World(rank, 8), batch=16), 10, workers=rank % 3)
        assert len(keys) == 20


def test_real_samples_come_through(phantom_shards: Path) -> None:
    corpus = pipe_corpus(phantom_shards)
    rows = {name: row for row, name in enumerate(sorted(corpus.parts[0].records[0].categories))}
    prompts = PromptConfig(categories_per_volume=2, pseudo_per_volume=2)
    draw = functools.partial(sampling.sample_segmentation, model=TINY, data=DataConfig(), prompts=prompts, row_of=rows)
    batch = unpacked(next(iter(PipeStream(corpus, draw, BatchPlan(corpus.num_samples, 4)))))
    assert batch["image_BCDHW"].shape == (4, 1, 8, 16, 16) and batch["masks_BKDHW"].shape == (4, 2, 8, 16, 16)
    assert int(batch["seen"]) == 4


def test_a_damaged_member_and_a_cut_shard_are_left_out_and_said(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(phantom_shards, tmp_path / "shards"))
    corpus = pipe_corpus(folder)
    records = corpus.parts[0].records
    flipped, cut = records[0], next(one for one in records[::-1] if one.shard != records[0].shard)
    flip(folder, flipped, Member.CT)
    path, place = folder / cut.shard, cut.members[Member.CT.value][0]
    path.write_bytes(path.read_bytes()[: place + 100])
    health = DamageTally(corpus)
    keys = []
    for batch in islice(iter(_stream(corpus)), 12):
        keys += batch["key_B"].tolist()
        health.note(batch["damaged_BA2"].numpy())
    lost = {int(flipped.key[-3:]), int(cut.key[-3:])}
    assert lost.isdisjoint(keys) and set(keys) == set(range(6)) - lost
    assert {damage.value for _, damage in health.causes} == {"altered", "missing"}
    assert f"{cut.shard}" in caplog.text and "its further samples are left out of this pass" in caplog.text


def test_a_command_that_fails_ends_the_stream(phantom_shards: Path) -> None:
    corpus = pipe_corpus(phantom_shards)
    broken = Corpus([type(corpus.parts[0])(type(corpus.parts[0].store)("pipe:false {file}"), corpus.parts[0].records)])
    with pytest.raises(ShardError, match=r"pipe:false .*a complete pass gave no usable sample \(missing\)"):
        next(iter(_stream(broken)))


def test_a_pipe_is_not_mixed_with_other_folders(phantom_shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.mix: a pipe: source .*cannot be mixed"):
        open_folders(DataConfig(shards=str(phantom_shards), mix=[f"pipe:cat {phantom_shards}/{{file}}"]))
