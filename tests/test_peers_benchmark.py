"""`benchmarks/peers.py`: its corpus, segvol_pl's own rows and its table, at a tiny size; `remote.py`'s server."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from segvol_pl.data import sampling
from segvol_pl.data.store import Store

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts, imported as they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("peers", "peers_turn", "peers_own", "peers_loaders", "remote")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def corpus(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return scripts.peers.prepare(tmp_path_factory.mktemp("peers") / "small", scripts.peers.SMALL)


def test_own_rows_draw_the_voxels_of_the_corpus(
    scripts: Any, corpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sampling, "window_start", sampling.window_start)
    monkeypatch.setattr(scripts.peers_turn, "WARM_SECONDS", 0.0)
    found = scripts.peers.Found(left_out={"litdata": "No module named 'litdata'"})
    for name, loader in scripts.peers_own.LOADERS.items():
        figures = scripts.peers_turn.turn(corpus, loader(), 0.0)
        assert figures["samples"] == scripts.peers_turn.LEAST_SAMPLES and figures["wall_ms"] > 0
        found.turns[name] = [figures]
    assert found.turns["segvol_pl"][0]["read_mb"] > 0 and found.turns["segvol_pl"][0]["stored_mb"] > 0
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- --8<-- [start:peers] -->\nthe last table\n<!-- --8<-- [end:peers] -->\nafter\n")
    monkeypatch.setattr(scripts.peers, "record", lambda *_: None)
    scripts.peers.report(found, scripts.peers.SMALL, tmp_path, str(page))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("-->\nafter\n") and "the last table" not in text
    assert "| **segvol_pl, stream** |" in text and "Left out: litdata" in text and "No module named" in text


def test_other_voxels_are_noticed(scripts: Any, corpus: Any) -> None:
    key, start = next(corpus.windows())
    hu_DHW, label_DHW = (np.array(corpus.raw(key, role)[corpus.slices(start)]) for role in ("ct", "label"))
    assert corpus.differs(corpus.crop(key, start, hu_DHW, label_DHW)) == ""
    label_DHW[0, 0, 0] ^= 1
    assert corpus.differs(corpus.crop(key, start, hu_DHW, label_DHW)) == "1 voxels of its label map differ"
    assert "its image differs" in corpus.differs(corpus.crop(key, start, -hu_DHW, label_DHW))


def test_every_row_has_a_loader(scripts: Any) -> None:
    assert set(scripts.peers.ROWS) == {*scripts.peers_own.LOADERS, *scripts.peers_loaders.LOADERS}


def test_the_server_gives_the_bytes_of_the_folder(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="http: needs fsspec's http extra")
    s3fs = pytest.importorskip("s3fs", reason="s3: needs s3fs")
    content = bytes(range(256))
    (tmp_path / "shard.tar").write_bytes(content)
    with scripts.remote.serving(tmp_path) as served:
        for name, value in scripts.remote.s3_settings(served.url).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        for place in (f"{served.url}/005", "s3://005"):
            store = Store(place, retry_seconds=5.0)
            assert store.file("shard.tar") == content
            assert store.member("shard.tar", 10, 90, [(0, 5), (80, 90)]) == [content[10:15], content[90:100]]
            with pytest.raises(FileNotFoundError):
                store.file("gone.tar")
    s3fs.S3FileSystem.clear_instance_cache()
