"""Models of a hub: taken once, cached, pinned, refused in one line; and uploaded. huggingface_hub is the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import save_untrained
from fake_hub import GATED, Hub, running

from segvol_pl.config.loader import load

TAKE = """
import sys
from segvol_pl.errors import HubError
from segvol_pl.hub import COMMITS, local
for place in sys.argv[1:]:
    try:
        print(local(place).read_text(), COMMITS[place])
    except HubError as error:
        print("refused:", error)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as started:
        yield started


def python(hub: Hub, home: Path, *arguments: str, **more: str) -> list[str]:
    """The lines that a process prints which takes `hub` for the real one and keeps its cache in `home`."""
    environment = {**os.environ, **hub.environment(home), **more}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def take(hub: Hub, home: Path, *places: str, **more: str) -> list[str]:
    return python(hub, home, "-c", TAKE, *places, **more)


def test_a_model_is_taken_once_and_used_without_network(hub: Hub, tmp_path: Path) -> None:
    old = hub.commit("owner/liver", {"model.safetensors": b"old", "model.bin": b"a pickle"})
    new = hub.commit("owner/liver", {"model.safetensors": b"new"})
    bundle = hub.commit("owner/bundle", {"models/model.safetensors": b"bundle"})
    places = ["hub:owner/liver", f"hub:owner/liver@{old}", "hub:owner/bundle"]
    expected = [f"new {new}", f"old {old}", f"bundle {bundle}"]
    assert take(hub, tmp_path, *places) == expected
    downloaded = [line for line in hub.seen if line.startswith("GET") and "/resolve/" in line]
    assert len(downloaded) == 3 and all(line.endswith("/model.safetensors") for line in downloaded)
    hub.seen.clear()
    assert take(hub, tmp_path, *places, HF_HUB_OFFLINE="1") == expected
    assert not [line for line in hub.seen if "/resolve/" in line]
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert take(hub, tmp_path, *places, **nobody) == expected
    hub.commit("owner/liver", {"model.safetensors": b"newest"})
    assert take(hub, tmp_path, f"hub:owner/liver@{new}") == [f"new {new}"]


def test_what_cannot_be_taken_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.commit("owner/pickled", {"pytorch_model.bin": b"a pickle"})
    places = ["hub:owner/absent", "hub:owner/pickled", f"hub:{GATED}", "hub:owner/pickled@v2", "hub:liver"]
    absent, pickled, gated, revision, unnamed = take(hub, tmp_path, *places)
    assert absent.startswith(f"refused: hub:owner/absent: {hub.address} has no such repository, or it is private")
    assert "hub:owner/pickled: holds no model.safetensors and no models/model.safetensors: other files" in pickled
    assert f"hub:{GATED}: is gated: request access on {hub.address}, then set HF_TOKEN" in gated
    assert "hub:owner/pickled@v2: has no such branch, tag or commit" in revision
    assert "hub:liver: a model on the hub is named hub:OWNER/NAME, or hub:OWNER/NAME@REVISION" in unnamed
    (offline,) = take(hub, tmp_path, "hub:owner/new", HF_HUB_OFFLINE="1")
    assert "hub:owner/new: is not in the cache (" in offline and "HF_HUB_OFFLINE is set" in offline


@pytest.mark.slow  # huggingface_hub tries for 25 s
def test_a_hub_that_does_not_answer_is_named(hub: Hub, tmp_path: Path) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    (line,) = take(hub, tmp_path, "hub:owner/liver", **nobody)
    assert "hub:owner/liver: is not in the cache (" in line
    assert "http://127.0.0.1:9 cannot be reached: check the network and HF_ENDPOINT" in line


@pytest.mark.slow
def test_what_was_exported_to_a_hub_is_evaluated_from_it(hub: Hub, tmp_path: Path, phantom_shards: Path) -> None:
    """With the commit in the configuration and in the manifest."""
    checkpoint = save_untrained(tmp_path / "last.ckpt", ["liver", "spleen"])
    run = "import sys, json; from segvol_pl.__main__ import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    keys = [f"data.shards={phantom_shards}", f"out={tmp_path / 'results'}", "limit=1", "device=cpu", "pictures=0"]
    commands = [
        ["export", str(checkpoint), str(tmp_path / "model"), "hub=owner/liver"],
        ["evaluate", "checkpoint=hub:owner/liver", "prompts=[text]", "modes=[resize]", "categories=[liver]", *keys],
    ]
    python(hub, tmp_path / "home", "-c", run, json.dumps(commands))
    ((commit, files),) = hub.repositories["owner/liver"].items()
    assert files["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert hub.private == {"owner/liver": True}
    summary = json.loads((tmp_path / "results" / "summary.json").read_text(encoding="utf-8"))
    assert summary["checkpoint"] == f"hub:owner/liver@{commit}"
    assert summary["manifest"]["hub"]["hub:owner/liver"] == commit
    (tmp_path / "again.yaml").write_text(summary["manifest"]["config"], encoding="utf-8")
    assert load("evaluate", [str(tmp_path / "again.yaml")]).checkpoint == f"hub:owner/liver@{commit}"


def test_an_upload_that_is_not_allowed_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    program = """
from segvol_pl.errors import HubError
from segvol_pl.hub import make_repository
try:
    make_repository("owner/liver", private=True)
except HubError as error:
    print(error)
"""
    (line,) = python(hub, tmp_path, "-c", program, HF_TOKEN="another")
    assert line.startswith("hub:owner/liver: ") and "HF_TOKEN" in line and "another" not in line
    (line,) = python(hub, tmp_path, "-c", program, HF_HUB_OFFLINE="1")
    assert line == "hub:owner/liver: HF_HUB_OFFLINE is set: unset it to upload"
