"""The samples of an index as columns: what goes in comes out, from memory, from a file, in another process."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranged_http import serving

from segvol_pl.data import shard_index, store
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.data.shard_index import load_index, read_index, write_index
from segvol_pl.data.store import INDEX, Store
from segvol_pl.errors import ShardError

SIZES = {"a.tar": 2**40, "b.tar": 2**40}

names = st.sampled_from(["liver", "aorta", "left kidney", "Leber ü"])
places = st.tuples(st.integers(0, 2**39), st.integers(0, 2**39)).map(list)
record = st.builds(
    SampleRecord,
    key=st.just(""),
    shard=st.sampled_from(sorted(SIZES)),
    split=st.sampled_from(["train", "test"]),
    labelled=st.booleans(),
    shape=st.lists(st.integers(1, 2**30), min_size=3, max_size=3),
    spacing=st.none() | st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    categories=st.sets(names).map(sorted),
    members=st.dictionaries(st.sampled_from(["ct.b2nd", "facts.json", "mine.txt"]), places),
    content=st.sampled_from(["", "0" * 64, "f" * 64]),
    facts_sha256=st.sampled_from(["", "ab" * 32]),
)
many = st.lists(record, max_size=12).map(
    lambda found: [replace(each, key=f"case{'x' * (number % 9)}_{number}") for number, each in enumerate(found)]
)


@given(many, st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_records_come_out_as_they_went_in(records: list[SampleRecord], cut: int) -> None:
    table = SampleTable.of(records)
    table.check(SIZES, "here", "mend it")
    assert list(table) == records
    assert list(SampleTable.joined([SampleTable.of(records[:cut]), SampleTable.of(records[cut:])])) == records
    assert list(pickle.loads(pickle.dumps(table[::2]))) == records[::2]
    assert list(table.of_split("test").labelled()) == [one for one in records if one.split == "test" and one.labelled]
    assert list(table.lacking("mine.txt")) == [one for one in records if "mine.txt" not in one.members]
    assert {shard: list(part) for shard, part in table.by_shard().items()} == {
        shard: [one for one in records if one.shard == shard] for shard in {one.shard for one in records}
    }


@pytest.fixture
def large(phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The phantoms' shards with an index whose samples are in a file."""
    for path in phantom_shards.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(shard_index, "INLINE", 0)
    build_index(tmp_path)
    return tmp_path


def rows_file(folder: Path) -> Path:
    (path,) = folder.glob("index-*.npy")
    return path


def keys_of(table: SampleTable, results: Any) -> None:
    results.put([record.key for record in table])


def test_a_large_index_says_what_a_small_one_does(large: Path, phantom_shards: Path) -> None:
    index = read_index(Store(large))
    assert index == read_index(Store(phantom_shards))
    assert "samples" in json.loads((large / INDEX).read_text()) and rows_file(large).name in (large / INDEX).read_text()
    assert index.samples.digest() == read_index(Store(phantom_shards)).samples.digest()


def test_another_process_maps_the_file(large: Path) -> None:
    table = load_index(Store(large)).samples.of_split("train")
    assert len(pickle.dumps(table)) < 3000
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=keys_of, args=(table, results))
    process.start()
    assert results.get(timeout=120) == [record.key for record in table]
    process.join()


def test_a_remote_index_is_mapped_from_a_copy(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MERGED_BYTES", 1000)
    with serving(large) as url:
        assert load_index(Store(url)) == load_index(Store(large))


def test_a_new_index_replaces_the_rows_of_the_old(large: Path) -> None:
    before, index = rows_file(large), load_index(Store(large))
    write_index(large, replace(index, samples=index.samples[:2]))
    assert rows_file(large) != before and len(load_index(Store(large)).samples) == 2
    # A process that has the old rows open keeps them.
    assert len(list(index.samples)) == len(index.samples) > 2


def test_every_flipped_byte_of_the_rows_is_found(large: Path) -> None:
    path = rows_file(large)
    sound, rng = path.read_bytes(), np.random.default_rng(0)
    for place in [0, 9, 60, *rng.integers(0, len(sound), 60).tolist(), len(sound) - 1]:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        with pytest.raises(ShardError, match=r"index-.*npy .*run segvol-pl index|not an index of shards"):
            load_index(Store(large))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no rows", None])
def test_rows_that_are_no_rows_are_refused_in_one_line(large: Path, content: bytes | None) -> None:
    path = rows_file(large)
    sound = path.read_bytes()
    path.write_bytes(sound[:-9] if content is None else content)
    with pytest.raises(ShardError, match=r"does not hold the samples of an index.*run segvol-pl index"):
        load_index(Store(large))
    path.unlink()
    with pytest.raises(ShardError, match=r"is missing although the index names it"):
        load_index(Store(large))
    text = json.loads((large / INDEX).read_text())
    text["samples"]["file"] = "../index.npy"
    (large / INDEX).write_text(json.dumps(text))
    with pytest.raises(Exception, match=r"outside the folder"):
        load_index(Store(large))


def sample(key: str, **changes: Any) -> SampleRecord:
    return replace(SampleRecord(key, "a.tar", "train", True, [1, 1, 1], None, [], {"ct": [0, 5]}), **changes)


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        (sample("one", shard="b.tar"), "sample one is in a.tar and in b.tar"),
        (sample("two", shard="c.tar"), "a shard that it does not list"),
        (sample("two", members={"ct": [2**40 - 1, 2]}), "sample two: ct lies outside a.tar"),
        (sample("two", members={"ct": [2**63 - 1, 2**63 - 1]}), "sample two: ct lies outside a.tar"),
        (sample("two", members={"ct": [5, -2]}), "sample two: ct lies outside a.tar"),
        (sample("two/three"), "'two/three' is not a key"),
        (sample(""), "'' is not a key"),
        (sample("two\0three"), "is not a key"),
        (sample("two", shape=[1, 0, 1]), "an axis without voxels"),
    ],
)
def test_rows_that_describe_no_shards_are_named(second: SampleRecord, fault: str) -> None:
    table = SampleTable.of([sample("one"), second])
    with pytest.raises(ShardError, match=fault):
        table.check(SIZES, "here", "mend it")


def test_fingerprints_differ_where_texts_do() -> None:
    table = SampleTable.of([sample(f"k{number}") for number in range(5000)])
    assert len(np.unique(table.fingerprints("key"))) == 5000
    wider = SampleTable.of([sample("k7"), sample("a" * 40)])
    assert wider.fingerprints("key")[0] == table.fingerprints("key")[7]
