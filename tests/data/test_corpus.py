"""Several folders as one corpus: weights, nested shares, what an epoch deals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.config import DataConfig, RunConfig
from segvol_pl.data.corpus import (
    Corpus,
    Part,
    held_out_corpus,
    nested,
    open_folders,
    parse_weighted,
    source_names,
    training_corpus,
)
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.data.store import INDEX, Store
from segvol_pl.errors import ConfigError, ShardError, StoreError


def records(count: int, name: str = "case") -> SampleTable:
    return SampleTable.of(
        [
            SampleRecord(f"{name}{i}", "a.tar", "train", True, [4, 4, 4], [1.0] * 3, [], {}, content=f"{name} {i}")
            for i in range(count)
        ]
    )


parts = st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.1, 0.5, 1.0, 2.0, 2.5])), min_size=1, max_size=4)


@given(parts, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_an_epoch_deals_each_sample_as_often_as_its_folder_says(drawn: list[tuple[int, float]], epoch: int) -> None:
    corpus = Corpus([Part(Store(f"folder{i}"), records(count), times) for i, (count, times) in enumerate(drawn)])
    rows = corpus.rows(seed=1, epoch=epoch)
    assert len(rows) == corpus.num_samples
    first = 0
    for count, times in drawn:
        seen = np.bincount(rows, minlength=corpus.num_volumes)[first : first + count]
        assert seen.sum() == round(times * count)
        assert set(seen) <= {int(times), int(times) + 1} and (times % 1 or set(seen) == {int(times)})
        first += count


def test_a_fraction_is_another_one_in_every_epoch_and_the_same_on_every_machine() -> None:
    corpus = Corpus([Part(Store("a"), records(40), 0.5)])
    first, second = set(corpus.rows(0, 0)), set(corpus.rows(0, 1))
    assert first != second and len(first) == len(second) == 20
    assert set(corpus.rows(0, 0)) == first and set(corpus.rows(1, 0)) != first


def test_rows_know_their_folder() -> None:
    corpus = Corpus([Part(Store("a"), records(3, "a")), Part(Store("b"), records(2, "b"))])
    assert [corpus.located(row) for row in range(5)] == [
        *((Store("a"), record) for record in corpus.parts[0].records),
        *((Store("b"), record) for record in corpus.parts[1].records),
    ]
    with pytest.raises(IndexError, match="row 5"):
        corpus.located(5)


@given(st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_smaller_shares_lie_within_larger_ones(count: int) -> None:
    whole = records(count)
    shares = [{record.key for record in nested(whole, share, "a")} for share in (0.01, 0.1, 0.5, 1.0)]
    assert shares[0] <= shares[1] <= shares[2] <= shares[3] == {record.key for record in whole}
    assert [len(share) for share in shares] == [max(1, round(share * count)) for share in (0.01, 0.1, 0.5, 1.0)]


def test_a_share_depends_on_content_not_on_names_or_order() -> None:
    whole = records(50)
    renamed = [replace(record, key=f"other{i}", shard="b.tar") for i, record in enumerate(reversed(whole))]
    kept = {record.content for record in nested(whole, 0.2, "a")}
    assert {record.content for record in nested(SampleTable.of(renamed), 0.2, "b")} == kept


def test_an_index_without_hashes_says_how_to_get_them() -> None:
    with pytest.raises(ConfigError, match=r"data\.fraction: .*run segvol-pl index shards/old"):
        nested(SampleTable.of([replace(record, content="") for record in records(3)]), 0.5, "shards/old")


@pytest.mark.parametrize(
    ("entry", "parsed"),
    [("shards/b", ("shards/b", 1.0)), ("0.5*shards/b", ("shards/b", 0.5)), ("3*s3://x/y", ("s3://x/y", 3.0))],
)
def test_weights_are_read_off_the_entry(entry: str, parsed: tuple[str, float]) -> None:
    assert parse_weighted(entry) == parsed


@pytest.mark.parametrize("entry", ["0*a", "-1*a", "much*a", "2*", "nan*a", "inf*a"])
def test_a_wrong_weight_is_named(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.mix: .*positive weight"):
        parse_weighted(entry)


def test_folders_open_as_one_corpus(phantom_shards: Path) -> None:
    data = DataConfig(shards=str(phantom_shards), mix=[f"2*{phantom_shards}"], split="all", fraction=0.5)
    folders = open_folders(data)
    corpus, held_out = training_corpus(folders, data, labelled=True), held_out_corpus(folders, "test", labelled=True)
    assert [len(part.records) for part in corpus.parts] == [3, 3] and corpus.num_samples == 9
    tested = folders[0].index.splits["test"]
    assert [part.dealt for part in held_out.parts] == [len(part.records) for part in held_out.parts] == [tested] * 2
    assert [folder.index.dataset for folder in folders] == ["phantoms", "phantoms"]
    with pytest.raises(ConfigError, match=r"data\.split, .*has no labelled samples in 'none'"):
        held_out_corpus(folders, "none", labelled=True)
    with pytest.raises(ShardError, match=INDEX):
        open_folders(replace(data, mix=["nowhere"]))


@pytest.fixture
def train_only(phantom_shards: Path, tmp_path: Path) -> Path:
    """A set packed with test_fraction=0, as an extra one to train on."""
    folder = Path(shutil.copytree(phantom_shards, tmp_path / "extra"))
    for path in folder.glob("*-test-*.tar"):
        path.unlink()
    build_index(folder)
    return folder


def test_a_folder_without_a_test_split_is_mixed_in_to_train_on(
    phantom_shards: Path, train_only: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = DataConfig(shards=str(phantom_shards), mix=[f"2*{train_only}"], global_batch=2, samples_per_volume=4)
    module = VolumeModule(data, RunConfig(out="unused"), None, None, labelled=True)  # type: ignore[arg-type]
    assert [str(part.store.folder) for part in module.train_corpus.parts] == [str(phantom_shards), str(train_only)]
    assert [str(part.store.folder) for part in module.val_corpus.parts] == [str(phantom_shards)]
    assert {record.split for record in module.val_corpus.parts[0].records} == {"test"}
    assert f"{train_only} has no samples in 'test'" in caplog.text
    with pytest.raises(ConfigError, match=rf"data\.val_split: {train_only} has no labelled samples in 'test'"):
        held_out_corpus(open_folders(replace(data, shards=str(train_only), mix=[])), "test", labelled=True)
    with pytest.raises(ConfigError, match=rf"{train_only} has no labelled samples in 'test'"):
        training_corpus(open_folders(data), replace(data, split="test"), labelled=True)


def test_a_missing_shard_is_borne_within_the_bound(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(phantom_shards, tmp_path / "shards"))
    lost = sorted(folder.glob("*.tar"))[0]
    lost.unlink()
    data = DataConfig(shards=str(folder), max_bad_fraction=0.5)
    corpus = held_out_corpus(open_folders(data), "all", labelled=True)
    assert corpus.num_volumes == 6 and f"{lost} is missing" in caplog.text
    with pytest.raises(ShardError, match=f"{lost.name} is missing although the index names it"):
        open_folders(replace(data, max_bad_fraction=0.001))


def test_a_store_that_is_away_is_waited_for_as_long_as_stated() -> None:
    pytest.importorskip("aiohttp", reason="http: needs fsspec's http extra")
    data = DataConfig(shards="http://127.0.0.1:9/shards", retry_seconds=0.2)
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9/shards/index\.json: the store gave no response for 0 s"):
        open_folders(data)


def test_sources_are_named_by_the_end_of_their_path() -> None:
    assert source_names(["shards/amos", "shards/total seg/"]) == ["amos", "total_seg"]
    assert source_names(["amos/v2", "flare/v2"]) == ["amos_v2", "flare_v2"]
    assert source_names(["s3://b/ct?key=1", "/x/ct"]) == ["b_ct", "x_ct"]
    assert source_names(["a", "a", "text"], reserved=["text"]) == ["a", "a-2", "text-2"]
    assert source_names(["x" * 100]) == ["x" * 40] and source_names(["++"]) == ["source"]
