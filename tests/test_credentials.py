"""Credentials in the names of places: used to read, and masked in whatever is written, logged or raised."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from factories import wandb_config
from wandb_files import records

from segvol_pl.config.loader import changes, load, plain, resolved, to_yaml
from segvol_pl.credentials import is_masked, masked
from segvol_pl.data.corpus import parse_weighted
from segvol_pl.data.store import Store
from segvol_pl.errors import ConfigError, StoreError

SECRET = "s3cretpw"
GIVEN = [f"data.shards=http://alice:{SECRET}@host/shards", "run.out=run", "optim.max_steps=1"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"http://alice:{SECRET}@host:8000/a", "http://alice:***@host:8000/a"),
        (f"no answer (url='https://:{SECRET}@host/a')", "no answer (url='https://:***@host/a')"),
        (f"http:/alice:{SECRET}@host/a", "http:/alice:***@host/a"),
        (f"2*s3://id:{SECRET}@host/a", "2*s3://id:***@host/a"),
        (f"pipe:curl -sf http://alice:{SECRET}@host/{{file}}", "pipe:curl -sf http://alice:***@host/{file}"),
        (
            f"https://host/a?X-Amz-Date=1&X-Amz-Security-Token={SECRET}&X-Amz-Signature={SECRET}",
            "https://host/a?X-Amz-Date=1&X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        (f"https://host/a?sv=1&sig={SECRET}&se=2", "https://host/a?sv=1&sig=***&se=2"),
        (
            f"pipe:curl 'https://host/{{file}}?token={SECRET}' | zcat",
            "pipe:curl 'https://host/{file}?token=***' | zcat",
        ),
        (f"https://host/a?AccessKey={SECRET}&password={SECRET}", "https://host/a?AccessKey=***&password=***"),
    ],
)
def test_passwords_tokens_keys_and_signatures_are_masked(text: str, want: str) -> None:
    assert masked(text) == want and is_masked(want) and not is_masked(text)
    assert masked(want) == want


@pytest.mark.parametrize(
    "text",
    ["shards/a:b@c", "https://host/a?design=1&page=2", "s3://bucket/key=1/a", "toys:jaccard", "http://alice@host/a"],
)
def test_other_names_stay_as_they_are(text: str) -> None:
    assert masked(text) == text and not is_masked(text)


def test_a_configuration_is_written_without_them_and_keeps_them_itself() -> None:
    config = load("train", GIVEN)
    assert config.data.shards == f"http://alice:{SECRET}@host/shards"
    for written in (to_yaml(config), str(plain(config)), resolved("train", GIVEN), resolved("train", GIVEN[:2])):
        assert SECRET not in written and "http://alice:***@host/shards" in written


def test_runs_are_compared_by_what_is_written() -> None:
    """Also one whose checkpoint was written before anything was masked."""
    before, now = ({"data": {"mix": [f"2*http://a:{password}@host/x"]}} for password in ("old", SECRET))
    assert changes(before, now) == {}
    ((then, given),) = changes(before, {"data": {"mix": [f"2*http://a:{SECRET}@host/y"]}}).values()
    assert (then, given) == (["2*http://a:***@host/x"], ["2*http://a:***@host/y"])


def test_a_masked_place_asks_for_its_credentials() -> None:
    with pytest.raises(StoreError, match=r"http://a:\*\*\*@host/x: its credentials were masked .*give the place again"):
        Store("http://a:***@host/x")


def test_errors_about_a_configuration_mask_them() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_weighted(f"0*http://a:{SECRET}@host/x")
    assert SECRET not in str(caught.value) and "http://a:***@host/x" in str(caught.value)


# ---- a run from a server that asks for a password ----


class Guarded(BaseHTTPRequestHandler):
    """Ranges of the files in `folder`, for alice."""

    folder: Path

    def do_GET(self) -> None:
        allowed = "Basic " + base64.b64encode(f"alice:{SECRET}".encode()).decode()
        path = self.folder / self.path.lstrip("/")
        if self.headers.get("Authorization") != allowed:
            self.send_error(401)
            return
        content, wanted = path.read_bytes(), self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def guarded(phantom_shards: Path) -> Iterator[str]:
    """Host and port."""
    handler = type("Handler", (Guarded,), {"folder": phantom_shards})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    command = [sys.executable, "-m", "segvol_pl", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_nothing_that_a_run_writes_or_says_holds_them(guarded: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="http: needs fsspec's http extra")
    out, place = tmp_path / "run", f"data.shards=http://alice:{SECRET}@{guarded}"
    (tmp_path / "train.yaml").write_text(to_yaml(wandb_config(Path("elsewhere"), out, steps=1)))
    done = program("train", tmp_path / "train.yaml", place)
    assert done.returncode == 0, done.stderr
    assert records(out), "wandb's own file, whole"
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"config.yaml", "last.ckpt", "manifest.json"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr
    kept = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]["config"]
    assert kept["data"]["shards"] == f"http://alice:***@{guarded}"
    again = program("train", tmp_path / "train.yaml", place)
    assert again.returncode == 0 and "already at step 1 of 1" in again.stderr
    refused = program("train", out / "config.yaml")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"segvol-pl train: error: http://alice:***@{guarded}: its credentials were masked")


def test_the_error_of_a_place_that_cannot_be_reached_masks_them(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="http: needs fsspec's http extra")
    place = f"data.shards=http://alice:{SECRET}@127.0.0.1:9/shards"
    out = f"run.out={tmp_path / 'run'}"
    done = program("train", "--debug", place, out, "optim.max_steps=1", "data.retry_seconds=0")
    assert done.returncode == 1 and SECRET not in done.stdout + done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("segvol-pl train: error: http://alice:***@127.0.0.1:9/shards/index.json: the store gave no")
    assert "Traceback" in done.stderr and not (tmp_path / "run").exists()
