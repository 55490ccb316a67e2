"""Frozen features: those of the encoder, each volume once, by any number of ranks, killed and continued."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import TINY, save_untrained
from ranks import Ranks

from segvol_pl.config import EmbedConfig, OptimConfig, Precision, PretrainConfig
from segvol_pl.config.loader import plain
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_facts, read_slices
from segvol_pl.data.store import Store
from segvol_pl.errors import ConfigError, EvaluateError
from segvol_pl.evaluation.embed import embed
from segvol_pl.evaluation.feature_folder import INTENSITY, TOKENS, TRAINED, UNTRAINED, load_features, part_path
from segvol_pl.imaging.intensity import normalise
from segvol_pl.model.convert import export
from segvol_pl.training.pretrain import SimMIMTask

RANKED = "import os; os.environ |= {'RANK': os.environ['LOCAL_RANK'], 'WORLD_SIZE': '2'}"
KILLED = """
import os
import numpy as np
from segvol_pl.evaluation import feature_folder
savez, parts = np.savez, []
def killed(path, **arrays):
    parts.append(path)
    if len(parts) == 2:
        open(path, "wb").write(b"PK half a part")
        os.kill(os.getpid(), 9)
    savez(path, **arrays)
np.savez = killed
"""
"""The process is killed while it writes its second part."""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimMIMTask]:
    """A checkpoint as pre-training writes it, and its task."""
    torch.manual_seed(1)
    task = SimMIMTask(PretrainConfig(model=TINY, optim=OptimConfig(max_steps=1)))
    parameters = {"task": "pretrain", "config": plain(task.config)}
    path = tmp_path_factory.mktemp("pretrained") / "last.ckpt"
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": parameters}, path)
    return path, task.eval()


@pytest.fixture(scope="module")
def config(
    phantom_shards: Path, pretrained: tuple[Path, SimMIMTask], tmp_path_factory: pytest.TempPathFactory
) -> EmbedConfig:
    return EmbedConfig(
        checkpoint=str(pretrained[0]),
        shards=str(phantom_shards),
        out=str(tmp_path_factory.mktemp("embedded") / "whole"),
        tokens=True,
        volumes_per_part=2,
        batch=1,
        device="cpu",
        precision=Precision.fp32,
    )


@pytest.fixture(scope="module")
def whole(config: EmbedConfig) -> Path:
    """By one process in one go."""
    return embed(config)


def keys(config: EmbedConfig) -> list[str]:
    """As on the command line."""
    named = vars(config).items()
    return [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in named]


def same(one: Path, other: Path) -> None:
    ours, theirs = load_features(one), load_features(other)
    assert ours.keys == theirs.keys
    for name, array in ours.arrays.items():
        assert np.array_equal(array, theirs.arrays[name]), name


def test_features_are_the_mean_of_the_encoders_tokens(
    config: EmbedConfig, whole: Path, pretrained: tuple[Path, SimMIMTask]
) -> None:
    features, store = load_features(whole), Store(config.shards)
    records = sorted(read_index(store).samples, key=lambda record: record.key)
    assert features.keys == [record.key for record in records] and len(records) == 6
    assert features.split_N.tolist() == [record.split for record in records]
    assert features.categories == [record.categories for record in records] and features.labelled_N.all()
    for row, record in enumerate(records):
        facts = read_facts(store, record)
        hu_DHW = read_slices(store, record, facts, {Member.OVERVIEW: slice(None)})[Member.OVERVIEW]
        image_DHW = normalise(hu_DHW, facts.intensity)
        with torch.no_grad():
            tokens_TE = pretrained[1].encoder(torch.from_numpy(image_DHW)[None, None])[0]
        np.testing.assert_allclose(features.arrays[TRAINED][row], tokens_TE.mean(0).numpy(), rtol=1e-4, atol=1e-5)
        pooled = image_DHW.reshape(8, 8, 2, 8, 2).mean((2, 4)).ravel()
        np.testing.assert_allclose(features.arrays[INTENSITY][row], pooled, rtol=1e-5, atol=1e-6)
        with np.load(part_path(whole, row // 2)) as part:
            assert part[TOKENS].dtype == np.float16
            np.testing.assert_allclose(part[TOKENS][row % 2], tokens_TE.numpy(), rtol=1e-2, atol=1e-2)
    assert not np.allclose(features.arrays[TRAINED], features.arrays[UNTRAINED])


def test_any_file_of_weights_and_any_overview_will_do(config: EmbedConfig, tmp_path: Path) -> None:
    """A training checkpoint whose input is larger than the packed overview; without the comparison."""
    other = save_untrained(tmp_path / "segment.ckpt", ["liver"])
    out = embed(replace(config, checkpoint=str(other), out=str(tmp_path / "out"), untrained=False, split="test"))
    features = load_features(out)
    assert set(features.arrays) == {TRAINED, INTENSITY} and set(features.split_N) == {"test"}
    assert features.arrays[TRAINED].shape[1] == 48 and features.index["input_shape"] == [8, 32, 32]
    export(str(other), str(tmp_path / "model.safetensors"))
    assert embed(
        replace(config, checkpoint=str(tmp_path / "model.safetensors"), out=str(out), untrained=False, split="test")
    )


def test_two_ranks_share_the_parts_and_find_the_same(
    config: EmbedConfig, whole: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    ours = replace(config, out=str(tmp_path / "shared"))
    said = ranks[2]("embed", *keys(ours), patch=RANKED)
    assert "part 2/2" in said and "6 volumes in 3 parts" in said
    same(whole, Path(ours.out))


def test_a_killed_process_loses_one_part_and_none_is_computed_again(
    config: EmbedConfig, whole: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    ours = replace(config, out=str(tmp_path / "killed"))
    (status,), _ = ranks[1].ended("embed", *keys(ours), patch=KILLED)
    assert status == -9
    done = {path: path.stat().st_mtime_ns for path in Path(ours.out, "parts").glob("0*.npz")}
    assert [path.name for path in done] == ["00000.npz"] and not Path(ours.out, "index.json").exists()
    with pytest.raises(EvaluateError, match="no finished folder of segvol-pl embed"):
        load_features(Path(ours.out))
    embed(ours)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    same(whole, Path(ours.out))


def test_a_folder_of_something_else_is_refused(config: EmbedConfig, whole: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("text")
    with pytest.raises(EvaluateError, match=r"holds other files \(thesis.txt\)"):
        embed(replace(config, out=str(foreign)))
    (foreign / "settings.json").write_text('{"schema": 2, "model": "x"}')
    with pytest.raises(EvaluateError, match="was not written by segvol-pl embed"):
        embed(replace(config, out=str(foreign)))
    (foreign / "settings.json").write_text("{")
    with pytest.raises(EvaluateError, match=r"settings\.json is damaged"):
        embed(replace(config, out=str(foreign)))
    other = save_untrained(tmp_path / "segment.ckpt", ["liver"])
    with pytest.raises(EvaluateError, match="features with other encoder, tokens:"):
        embed(replace(config, checkpoint=str(other), tokens=False))
    with pytest.raises(EvaluateError, match="features with other samples:"):
        embed(replace(config, split="test"))
    with pytest.raises(EvaluateError, match=r"has no volume in 'val'; it has test \(\d\), train \(\d\)"):
        embed(replace(config, split="val"))
    with pytest.raises(ConfigError, match="pipe: source"):
        embed(replace(config, shards="pipe:cat {file}"))


def test_a_damaged_part_is_named(config: EmbedConfig, whole: Path, tmp_path: Path) -> None:
    ours = replace(config, out=str(shutil.copytree(whole, tmp_path / "damaged")))
    path = part_path(Path(ours.out), 1)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content.replace(b"PK", b"XX")):
        path.write_bytes(damaged)
        with pytest.raises(EvaluateError, match=r"00001.npz is damaged .*: remove it, and run segvol-pl embed again"):
            embed(ours)
    path.unlink()
    embed(ours)
    same(whole, Path(ours.out))
    (Path(ours.out) / "volumes.csv").write_text("key,part\n")
    with pytest.raises(EvaluateError, match=r"its parts are not those of volumes\.csv"):
        load_features(Path(ours.out))


def test_a_volume_that_cannot_be_read_is_listed(config: EmbedConfig, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(config.shards, tmp_path / "shards"))
    record = min(read_index(Store(shards)).samples, key=lambda each: each.key)
    offset, size = record.members[Member.OVERVIEW.value]
    with (shards / record.shard).open("r+b") as stream:
        stream.seek(offset + size // 2)
        stream.write(b"damage")
    ours = replace(config, shards=str(shards), out=str(tmp_path / "out"))
    with pytest.raises(EvaluateError, match=rf"1 of 6 volumes cannot be read.*{record.key}"):
        embed(ours)
    out = embed(replace(ours, max_bad_fraction=0.2))
    assert record.key in json.loads((out / "index.json").read_text())["unread"]
    with (out / "volumes.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 5 and record.key not in load_features(out).keys
    shutil.copy(Path(config.shards, record.shard), shards / record.shard)
    assert len(load_features(embed(ours)).keys) == 6, "it is tried again"
