"""A run that hangs: it ends with one line that names the rank, and each rank leaves its post-mortem."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from factories import train_config
from ranks import Ranks

from segvol_pl.config import TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.data.loader_stacks import stacks_of
from segvol_pl.errors import HUNG
from segvol_pl.training import postmortem, watchdog
from segvol_pl.training.watchdog import suspects

HOST = socket.gethostname()


def hanging(shards: Path, out: Path, timeout: float, workers: int = 0) -> TrainConfig:
    """A run that does not end by itself, and validates only before its first step."""
    config = train_config(shards, out, steps=10_000)
    run = replace(config.run, checkpoint_every=100_000, val_every=0, val_batches=1, hang_timeout=timeout)
    return replace(config, run=run, data=replace(config.data, workers=workers, flip=0.1))


def ended(running: Ranks, config: TrainConfig, folder: Path, patch: str) -> tuple[list[int], list[str]]:
    """Exit status of each rank of a run with `patch`, and all lines about its end, of all ranks."""
    (folder / "run.yaml").write_text(to_yaml(config))
    statuses, said = running.ended("train", str(folder / "run.yaml"), patch=patch)
    return statuses, [line for text in said for line in text.splitlines() if "no progress for" in line]


def test_a_stopped_rank_is_named_and_the_run_ends(phantom_shards: Path, tmp_path: Path) -> None:
    """Under Lightning's launcher. The stopped process cannot write, and is killed; the other writes its stacks."""
    config = hanging(phantom_shards, tmp_path / "run", timeout=8.0)
    (tmp_path / "run.yaml").write_text(to_yaml(replace(config, run=replace(config.run, devices=2))))
    command = [sys.executable, "-m", "segvol_pl", "train", str(tmp_path / "run.yaml")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    hung = _pid_after(tmp_path / "run", rank=1, done=10, runs=lambda: running.poll() is None)
    os.kill(hung, signal.SIGSTOP)
    _, errors = running.communicate(timeout=90)
    assert running.returncode == HUNG, errors
    (line,) = re.findall(r"no progress for .*", errors)
    assert re.search(rf"stalled: rank 1 on {HOST} \(process {hung}, after [a-z ]+\): its process does not run; ", line)
    folder = tmp_path / "run/postmortem"
    assert f"stacks of 1 of 2 ranks are in {folder}" in line
    assert (folder / "summary.txt").read_text().strip() == line
    assert not list(folder.glob("rank-1*"))
    # Killed it is at once; gone when the kernel has let go of its memory.
    deadline = time.monotonic() + 10
    while not _gone(hung) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _gone(hung)


def test_if_rank_0_is_stopped_another_names_it(phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(hanging(phantom_shards, tmp_path / "run", timeout=5.0)))
    ranks[2].begin("train", str(tmp_path / "run.yaml"))
    os.kill(_pid_after(tmp_path / "run", rank=0, done=10, runs=lambda: True), signal.SIGSTOP)
    assert ranks[2].end() == [-signal.SIGKILL, HUNG]
    first, second = ranks[2].said()
    assert "no progress for" not in first and second.count("no progress for") == 1
    assert f"stalled: rank 0 on {HOST}" in second and "its process does not run" in second


def _pid_after(out: Path, rank: int, done: int, runs: Callable[[], bool]) -> int:
    """The process of a rank, once it has made some progress."""
    beat, deadline = out / f"ranks/rank-{rank}.json", time.monotonic() + 120
    while not beat.exists() or json.loads(beat.read_text())["done"] < done:
        assert runs() and time.monotonic() < deadline
        time.sleep(0.05)
    return int(json.loads(beat.read_text())["pid"])


def _gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


STUCK = """
import time
from segvol_pl.data.stream import Stream
sample = Stream.sample
def stuck_in_a_read(self, epoch, position, rows):
    if {where}:
        time.sleep(1000)
    return sample(self, epoch, position, rows)
Stream.sample = stuck_in_a_read
"""


@pytest.mark.parametrize(
    ("where", "number"), [("position > 3", 1), ("self.draw.keywords['data'].flip == 0 and self.world.rank == 1", 2)]
)
def test_a_loader_that_hangs_ends_the_run(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], where: str, number: int
) -> None:
    """That of a run of one process in training, and that of one rank in the first validation."""
    config, hung = hanging(phantom_shards, tmp_path / "run", timeout=4.0, workers=1), number - 1
    statuses, lines = ended(ranks[number], config, tmp_path, STUCK.format(where=where))
    assert statuses == [HUNG] * number
    (line,) = lines
    assert re.search(
        rf"stalled: rank {hung} on {HOST} \(process \d+, after [a-z ]+\) in \w+ \(.*\.py:\d+\), waiting for a loader",
        line,
    )
    assert f"stacks of {number} of {number} ranks" in line
    folder = tmp_path / "run/postmortem"
    told = (folder / f"rank-{hung}.txt").read_text()
    assert re.search(r"process \d+ is sleeping, [\d.]+ s of CPU time", told) and "in stuck_in_a_read" in told
    assert "MainThread" in told and "in _fitted" in told
    if number == 1:
        assert re.search(r"step \d+, after a batch", told) and "last batch trained on: phantom" in told
        return
    waiting = (folder / "rank-0.txt").read_text()
    assert re.search(r"last collectives: gloo:\w+ number \d+ of group .*, not finished", waiting)
    assert pickle.loads((folder / "collectives_0").read_bytes())["entries"]


SLOW_DISK = {
    "that of the checkpoints": (
        "import time, torch\ntorch.save = lambda *_: time.sleep(1000)\n",
        r"stalled: rank 0 on \S+ \(process \d+\): last.ckpt is being written, for \d+ s; stacks of 1 of 1 ranks",
    ),
    "that of the run folder": (
        "import time\nfrom segvol_pl.training import postmortem, watchdog\npostmortem.PART = 0.5\n"
        "from segvol_pl.data.stream import Stream\n"
        "watchdog.write_text = postmortem.write_text = lambda *_: time.sleep(1000)\n"
        "Stream.sample = lambda *_: time.sleep(1000)\n",
        r"stalled: rank 0 on \S+ \(process \d+, after the start\) in .*; \S+/postmortem cannot be written; aborting",
    ),
}


@pytest.mark.parametrize("which", SLOW_DISK)
def test_a_disk_that_does_not_answer_ends_the_run(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], which: str
) -> None:
    """One to which a checkpoint is written in the background, while training continues; one of the run folder."""
    patch, expected = SLOW_DISK[which]
    config = hanging(phantom_shards, tmp_path / "run", timeout=3.0)
    config = replace(config, run=replace(config.run, checkpoint_every=3))
    statuses, lines = ended(ranks[1], config, tmp_path, patch)
    assert statuses == [HUNG] and len(lines) == 1 and re.search(expected, lines[0]), lines


def test_a_run_that_ends_is_watched_no_longer(phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    """The process of a run may live on."""
    config = train_config(phantom_shards, tmp_path / "run", steps=2)
    config = replace(config, run=replace(config.run, hang_timeout=3.0))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    patch = (
        "import time\nfrom segvol_pl.training import run\nbegun = run._fit\n"
        "def lives_on(*arguments):\n    begun(*arguments), time.sleep(5)\n"
        "run._fit = lives_on\n"
    )
    ranks[1]("train", str(tmp_path / "run.yaml"), patch=patch)


def test_an_earlier_post_mortem_is_moved_aside(tmp_path: Path) -> None:
    for start in (1, 2):
        for name in ("postmortem", "ranks"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "ranks/rank-0.json").write_text("{}")
        (tmp_path / "postmortem/summary.txt").write_text(f"of start {start}")
        watchdog.begin(tmp_path)
        assert not list((tmp_path / "ranks").iterdir()) and not (tmp_path / "postmortem/summary.txt").exists()
    watchdog.begin(tmp_path)
    kept = sorted((tmp_path / "postmortem").glob("*/*"))
    assert [path.read_text() for path in kept] == ["of start 1", "of start 2"]


def test_what_the_user_has_set_for_torchs_recorder_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in postmortem.RECORDED:
        monkeypatch.setenv(name, "7")
        postmortem.record_collectives()
        assert [os.environ.get(each) for each in postmortem.RECORDED if each in os.environ] == ["7"]
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    postmortem.record_collectives()
    assert os.environ.pop("TORCH_FR_BUFFER_SIZE") == "2000" and "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ


def test_what_does_not_return_or_fails_is_left_behind() -> None:
    assert postmortem.in_time(lambda: 1, 0) == 1
    assert postmortem.in_time(lambda: time.sleep(60) or 1, 0, seconds=0.05) == 0
    assert postmortem.in_time(lambda: 1 // 0, 7) == 7


def test_a_process_that_cannot_answer_gets_no_signal() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert stacks_of(other.pid, 0.2) == "" and other.poll() is None
    other.communicate(b"\n")
    assert other.returncode == 0


def test_a_frame_is_named_with_its_caller_in_this_package() -> None:
    place = postmortem.in_time(lambda: postmortem.stands(sys._getframe()), "")
    expected = r"<lambda> \(\S+test_watchdog.py:\d+\), called by run \(segvol_pl/training/postmortem.py:\d+\)"
    assert re.fullmatch(expected, place), place


def _beats(*pairs: tuple[int, int]) -> dict[int, Any]:
    return {
        rank: {"rank": rank, "host": f"n{rank}", "pid": rank, "done": done, "after": "a batch", "tick": tick}
        for rank, (done, tick) in enumerate(pairs)
    }


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        (_beats((5, 1), (5, 1)), _beats((5, 3)), ["rank 1, which never started"]),
        (
            _beats((5, 1), (5, 1), (5, 1)),
            _beats((5, 3), (5, 1), (5, 3)),
            ["rank 1 on n1 (process 1, after a batch): its process does not run"],
        ),
        (
            _beats((5, 1), (5, 1), (4, 1)),
            _beats((5, 3), (5, 2), (4, 3)),
            ["rank 2 on n2 (process 2, after a batch) in read (a.py:7)"],
        ),
        (
            _beats((5, 1), (5, 1)),
            _beats((5, 3), (5, 2)),
            ["all ranks, after the same operation; rank 0 on n0 (process 0, after a batch)"],
        ),
        (_beats((5, 1)), _beats((5, 3)), ["rank 0 on n0 (process 0, after a batch)"]),
    ],
)
def test_the_rank_that_all_wait_for_is_found(before: dict[int, Any], now: dict[int, Any], named: list[str]) -> None:
    assert suspects(before, now, len(before), {2: "read (a.py:7)"}) == named


def test_of_ranks_that_have_done_as_much_those_are_named_that_wait_for_no_other() -> None:
    waits = "barrier (torch/distributed/distributed_c10d.py:5356), called by log (segvol_pl/training/module.py:48)"
    beats = _beats((5, 1), (5, 1), (5, 1)), _beats((5, 3), (5, 2), (5, 2))
    named = suspects(*beats, 3, {0: waits, 1: "read (a.py:7)", 2: waits})
    assert named == ["rank 1 on n1 (process 1, after a batch) in read (a.py:7)"]
    assert suspects(*beats, 3, dict.fromkeys(range(3), waits))[0].startswith("all ranks, after the same operation")
