"""Volumes that occur twice are found by their voxels, whatever they are called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from segvol_pl.config import DataConfig, RunConfig
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.store import INDEX
from segvol_pl.errors import ShardError
from segvol_pl.packing.duplicates import Copy, crosses_splits, find_duplicates


@pytest.fixture
def two(phantom_shards: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same shards twice; in the second one sample is renamed, one has changed its split, the others have gone."""
    copy = Path(shutil.copytree(phantom_shards, tmp_path / "copy"))
    index = json.loads((copy / INDEX).read_text())
    first, second = index["samples"][:2]
    first["key"], second["split"] = "renamed", {"train": "test", "test": "train"}[second["split"]]
    index["samples"] = [first, second]
    (copy / INDEX).write_text(json.dumps(index))
    return phantom_shards, copy


def test_copies_are_found_and_leaks_come_first(two: tuple[Path, Path]) -> None:
    groups = find_duplicates(two)
    assert [crosses_splits(group) for group in groups] == [True, False]
    assert [place.folder for place in groups[1]] == [str(two[0]), str(two[1])]
    assert groups[1][1].key == "renamed" and isinstance(groups[1][1], Copy)
    assert find_duplicates(two[:1]) == []


def test_the_command_fails_if_a_split_leaks(two: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "segvol_pl", "overlap"]
    done = subprocess.run([*command, *two], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout.count("in two splits: ") == 1
    assert "2 volumes occur more than once, 1 of them in different splits" in done.stdout
    alone = subprocess.run([*command, two[0]], capture_output=True, text=True, check=False)
    assert alone.returncode == 0 and "0 volumes" in alone.stdout
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_an_index_without_hashes_is_refused(two: tuple[Path, Path]) -> None:
    index = json.loads((two[1] / INDEX).read_text())
    index["samples"][0]["content"] = ""
    (two[1] / INDEX).write_text(json.dumps(index))
    with pytest.raises(ShardError, match="holds no content hashes: run segvol-pl index"):
        find_duplicates(two)


def test_training_says_what_it_tests_on_too(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    alone = DataConfig(shards=str(two[0]), samples_per_volume=8, global_batch=2)
    run = RunConfig(out="unused")
    VolumeModule(replace(alone, mix=[str(two[1])]), run, None, None, labelled=True)  # type: ignore[arg-type]
    assert "held-out volumes are also trained on: run segvol-pl overlap" in caplog.text
    caplog.clear()
    VolumeModule(alone, run, None, None, labelled=True)  # type: ignore[arg-type]
    assert "also trained on" not in caplog.text
