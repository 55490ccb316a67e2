"""Samples behind HTTP: read in two rounds, the same as from a folder, and damage is found in every part."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged import flip
from factories import tiny_model
from large_samples import SHAPE, large_sample
from ranged_http import serving

from segvol_pl.config import DataConfig, PromptConfig
from segvol_pl.data import sampling, store
from segvol_pl.data.cache import Cache
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.damage import Damage, DamagedSample
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_array, read_facts, read_slices
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.data.store import Store
from segvol_pl.data.stream import BatchPlan, Stream

pytest.importorskip("aiohttp", reason="http: needs fsspec's http extra")

MODEL = tiny_model(input_shape=[16, 64, 64], patch_size=[4, 16, 16])
SLICES = {
    Member.CT: (slice(3, 35), slice(10, 74), slice(60, 124)),
    Member.LABEL: (slice(3, 35), slice(10, 74), slice(60, 124)),
    Member.REGIONS: slice(None),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "a.tar", [large_sample("a", 1), large_sample("b", 2)])
    build_index(folder)
    return folder


@pytest.fixture
def place(folder: Path) -> Iterator[str]:
    with serving(folder) as place:
        yield place


def stream_of(there: Store) -> Stream:
    records = list(read_index(there).samples)
    data = DataConfig(overview_fraction=0.3)
    draw = functools.partial(
        sampling.sample_segmentation,
        model=MODEL,
        data=data,
        prompts=PromptConfig(categories_per_volume=1, pseudo_per_volume=1),
        row_of={"liver": 0},
    )
    return Stream(Corpus([Part(there, records, 4)]), draw, BatchPlan(8, 2, seed=3))


@pytest.mark.parametrize("cached", [False, True])
def test_a_sample_takes_two_rounds_and_is_that_of_the_folder(
    folder: Path, place: str, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, read_remote = [], store._read_remote

    def counting(place: str, ranges: list[tuple[int, int]], retry_seconds: float) -> list[bytes]:
        rounds.append(len(ranges))
        return read_remote(place, ranges, retry_seconds)

    monkeypatch.setattr(store, "_read_remote", counting)
    cache = Cache(str(tmp_path / "cache"), 10**9) if cached else None
    far, near = stream_of(Store(place, cache=cache)), stream_of(Store(folder))
    rounds.clear()
    for a, b in zip(islice(far, 4), islice(near, 4), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len(rounds) <= 16 if cached else len(rounds) == 16, "8 samples"


def test_slices_read_together_are_those_read_alone(folder: Path) -> None:
    there = Store(folder)
    for record in read_index(there).samples:
        facts = read_facts(there, record)
        together = read_slices(there, record, facts, SLICES)
        assert list(together) == list(SLICES)
        for member, slices in SLICES.items():
            np.testing.assert_array_equal(together[member], read_array(there, record, facts, member)[slices])


@pytest.mark.parametrize("member", SLICES)
@pytest.mark.parametrize("cached", [False, True])
def test_damage_to_any_of_the_members_is_found(
    folder: Path, place: str, tmp_path: Path, member: Member, cached: bool
) -> None:
    """Also if a sound copy, or a damaged one, is cached."""
    cache = Cache(str(tmp_path / "cache"), 10**9) if cached else None
    far = Store(place, cache=cache)
    record = read_index(far).samples[1]
    facts = read_facts(far, record)
    whole = {**SLICES, Member.CT: slice(0, SHAPE[0]), Member.LABEL: slice(0, SHAPE[0])}
    flip(folder, record, member)
    for _ in range(2):
        with pytest.raises(DamagedSample, match=rf"sample b: {member.value} is not what was packed") as raised:
            read_slices(far, record, facts, whole)
        assert raised.value.damage is Damage.ALTERED
    flip(folder, record, member)
    sound = read_slices(far, record, facts, whole)
    if cached:
        flip(folder, record, member)
        again = read_slices(far, record, facts, whole)
        assert all(np.array_equal(sound[one], again[one]) for one in whole)
        assert cache is not None
        for path in cache.folder.glob("??/*"):
            path.write_bytes(bytes(path.stat().st_size))
        flip(folder, record, member)
        again = read_slices(far, record, facts, whole)
        assert all(np.array_equal(sound[one], again[one]) for one in whole), "read once more without the cache"


def test_a_shard_that_ends_too_soon_and_a_member_that_is_not_there(folder: Path, place: str) -> None:
    for there in (Store(folder), Store(place)):
        record = read_index(Store(folder)).samples[1]
        facts = read_facts(there, record)
        lacking = {ending: at for ending, at in record.members.items() if ending != Member.REGIONS.value}
        record = type(record)(**{**vars(record), "members": lacking})
        with pytest.raises(DamagedSample, match=r"sample b: regions\.b2nd is not there"):
            read_slices(there, record, facts, SLICES)
    record = read_index(Store(folder)).samples[1]
    path = folder / record.shard
    path.write_bytes(path.read_bytes()[: record.members[Member.LABEL.value][0] + 5000])
    for there in (Store(folder), Store(place, retry_seconds=1.0)):
        with pytest.raises(DamagedSample, match=r"sample b: label\.b2nd gave \d+ of \d+ bytes") as raised:
            read_slices(there, record, facts, SLICES)
        assert raised.value.damage is Damage.SHORT
