"""What comes from elsewhere (index, tar, list, recipe, checkpoint, web page) leads nowhere and runs nothing.

Beside these: names of shards and commands in tests/data/test_store.py, pickles for `predict` in
tests/model/test_checkpoint.py, files asked of the viewer in tests/inference/test_viewer.py, requests to the server in
tests/inference/test_server.py.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from factories import pipe_corpus
from scipy import sparse

from segvol_pl.__main__ import main
from segvol_pl.config import CasesConfig
from segvol_pl.data.cache import Cache, MemberParts
from segvol_pl.data.frames import decode_array
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.pipe import PipeStream
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.store import INDEX, Store
from segvol_pl.data.stream import BatchPlan
from segvol_pl.errors import CaseError, SampleError, ShardError, StoreError, VolumeError
from segvol_pl.evaluation.cases import find_cases
from segvol_pl.packing.m3d import m3d_cases, read_m3d_masks
from segvol_pl.packing.recipes import read_recipe
from segvol_pl.resources import bundled

Raw = dict[str, Any]


@pytest.fixture
def shards(phantom_shards: Path, tmp_path: Path) -> Path:
    """A copy to tamper with, in a folder of its own."""
    return shutil.copytree(phantom_shards, tmp_path / "within" / "shards")


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---- an index ----


def rename_shard(raw: Raw) -> None:
    name = raw["shards"][0]["name"]
    raw["shards"][0]["name"] = "../evil.tar"
    for sample in raw["samples"]:
        sample["shard"] = "../evil.tar" if sample["shard"] == name else sample["shard"]


INDEX_FAULTS: dict[str, tuple[Callable[[Raw], None], str]] = {
    "a key up": (lambda raw: raw["samples"][0].update(key="../../../evil"), INDEX),
    "a key from the root": (lambda raw: raw["samples"][0].update(key="/evil"), INDEX),
    "a key of two parts": (lambda raw: raw["samples"][0].update(key="a/evil"), INDEX),
    "no key": (lambda raw: raw["samples"][0].update(key=""), INDEX),
    "a key that is no text": (lambda raw: raw["samples"][0].update(key=["evil"]), INDEX),
    "a shard up": (lambda raw: raw["samples"][0].update(shard="../evil.tar"), INDEX),
    "a listed shard up": (rename_shard, "'../evil.tar'"),
    "before a shard": (lambda raw: raw["samples"][0]["members"].update(json=[-1, 10]), "json"),
    "behind a shard": (lambda raw: raw["samples"][0]["members"].update(json=[10, 1 << 50]), "json"),
    "of less than nothing": (lambda raw: raw["samples"][0]["members"].update(json=[10, -5]), "json"),
    "a place between bytes": (lambda raw: raw["samples"][0]["members"].update(json=[10.5, 10]), INDEX),
    "a shape that is none": (lambda raw: raw["samples"][0].update(shape=[4, -4, 4]), INDEX),
    "content that is no text": (lambda raw: raw["samples"][0].update(content=["a"]), INDEX),
    "a key twice": (lambda raw: raw["samples"].append(raw["samples"][0]), INDEX),
    "a shard twice": (lambda raw: raw["shards"].append(raw["shards"][0]), "segvol-pl index"),
    "a shard of half a byte": (lambda raw: raw["shards"][0].update(bytes=1e9), INDEX),
    "no place": (lambda raw: raw["samples"][0]["members"].update(json="here"), INDEX),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_leads_nowhere(fault: str, shards: Path, tmp_path: Path) -> None:
    tamper, said = INDEX_FAULTS[fault]
    raw = json.loads((shards / INDEX).read_text())
    tamper(raw)
    (shards / INDEX).write_text(json.dumps(raw))
    with pytest.raises((ShardError, StoreError), match=said):
        read_index(Store(shards))
    # An evaluation names files after keys: it does not come to that.
    with pytest.raises((ShardError, StoreError), match=said):
        find_cases(CasesConfig(shards=str(shards)))
    assert main(["verify", str(shards)]) == 1


def test_what_a_cache_holds_stays_in_its_folder(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), 10**6)
    for key in ("../../evil", "/evil", "a/b", "*"):
        assert cache.read([MemberParts(0, 4, [(0, 4)], key)], lambda spans: [b"evil"]) == [[b"evil"]]
    cache.forget("*")
    assert all(name.startswith("cache") for name in everything(tmp_path))
    assert sum(path.is_file() for path in (tmp_path / "cache").rglob("*")) == 3  # `*` is one key, not all


# ---- a tar ----


def add(shard: Path, name: str, **changes: Any) -> None:
    entry = tarfile.TarInfo(name)
    for attribute, value in changes.items():
        setattr(entry, attribute, value)
    content = b"" if changes else b"evil"
    entry.size = len(content)
    with tarfile.open(shard, "a") as tar:
        tar.addfile(entry, io.BytesIO(content))


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("../x.json", {}),
        ("/x.json", {}),
        ("a/../../x.json", {}),
        ("a/x.json", {}),
        ("x.json", LINK),
        ("x.json", {"type": tarfile.FIFOTYPE}),
    ],
)
def test_a_tar_leads_nowhere(name: str, changes: Raw, shards: Path, tmp_path: Path) -> None:
    shard = sorted(shards.glob("*.tar"))[0]
    add(shard, name, **changes)
    before = everything(tmp_path)
    (shards / INDEX).unlink()
    with pytest.raises(ShardError, match=shard.name):
        build_index(shards)
    assert everything(tmp_path) == before - {f"within/shards/{INDEX}"}


def test_a_tar_through_a_pipe_writes_nothing(shards: Path, tmp_path: Path) -> None:
    """What no index names is left out of the stream."""
    for shard in shards.glob("*.tar"):
        add(shard, "../../evil.json")
        add(shard, "x.json", **LINK)
    before, corpus = everything(tmp_path), pipe_corpus(shards)
    rows = {record.key: row for row, record in enumerate(corpus.parts[0].records)}
    stream = PipeStream(
        corpus, lambda facts, read, rng: {"row": np.array(rows[facts.key])}, BatchPlan(corpus.num_samples, 2, seed=0)
    )
    seen = [int(row) for _, batch in zip(range(3), stream, strict=False) for row in batch["row_B"]]
    assert sorted(seen) == list(range(6))
    assert everything(tmp_path) == before


@pytest.mark.parametrize("dtype", [b"|O8", b"<f8", b"|V8"])
def test_a_frame_of_anything_but_whole_numbers_is_refused(dtype: bytes) -> None:
    """Numbers that call themselves Python objects would be followed as addresses."""
    frame = bytes(blosc2.asarray(np.arange(64, dtype="<i8").reshape(4, 4, 4)).to_cframe())
    assert decode_array(frame).dtype == np.int64 and frame.count(b"<i8") == 1
    with pytest.raises(SampleError, match="not whole numbers"):
        decode_array(frame.replace(b"<i8", dtype))


# ---- lists and recipes ----


@pytest.mark.parametrize("image", ["a/../image.npy", "image.npy", "a/b/..", "../image.npy"])
def test_a_list_of_cases_names_folders_beside_it(image: str, tmp_path: Path) -> None:
    raw = {"labels": {"0": "background", "1": "liver"}, "train": [{"image": image, "label": "a/b/mask.npz"}]}
    path = tmp_path / "0001.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(CaseError, match="not files in a folder next to the list"):
        m3d_cases(path)


def test_a_mask_neither_unpickles_nor_reads_beyond_its_voxels(tmp_path: Path) -> None:
    sound = sparse.csc_matrix(np.eye(2, 24, dtype=np.int32))
    sound.indices[0] = 1 << 20
    sparse.save_npz(tmp_path / "far.npz", sound)
    np.savez(tmp_path / "objects.npz", format=b"csr", shape=(2, 24), data=np.array([Harm(tmp_path)], dtype=object))
    for name in ("far", "objects"):
        with pytest.raises(VolumeError, match=rf"{name}\.npz"):
            list(read_m3d_masks(tmp_path / f"{name}.npz", ["a", "b"], (2, 3, 4)))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("change", ['images: "../{id}.nii.gz"', 'images: "/data/{id}.nii.gz"'])
def test_a_recipe_stays_in_the_folder_of_its_set(change: str, tmp_path: Path) -> None:
    whole = (bundled("shards/datasets") / "btcv.yaml").read_text()
    kept = [line for line in whole.splitlines() if not line.startswith("images:")]
    (tmp_path / "btcv.yaml").write_text("\n".join([*kept, change]))
    with pytest.raises(CaseError, match=r"btcv\.yaml"):
        read_recipe(tmp_path / "btcv.yaml")


# ---- a checkpoint ----


class Harm:
    """Makes a file where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder / "harm"),)


@pytest.mark.parametrize("way", ["pretrained", "weights", "resumed"])
def test_code_in_a_checkpoint_does_not_run(
    way: str, phantom_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "global_step": 1, "extra": Harm(tmp_path)}, path)
    out = tmp_path / "run" if way == "resumed" else tmp_path / "other"
    tiny = [str(bundled("configs") / "tiny/train.yaml"), "track.wandb=disabled", "prompts.pseudo_per_volume=0"]
    given = [f"data.shards={phantom_shards}", f"run.out={out}", "optim.max_steps=2"]
    start = [] if way == "resumed" else [f"{way}={path}"]
    assert main(["train", *tiny, *given, *start]) == 1
    assert "is refused: code could hide in it" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "harm").exists()
