"""One writer for each folder, told apart by real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from holders import holding

from segvol_pl import folder_lock
from segvol_pl.errors import LockedError
from segvol_pl.folder_lock import LOST, FolderLock, Holder, read_holder

COUNTING = """
import sys, time
from dataclasses import replace
from pathlib import Path
from segvol_pl import folder_lock
path = Path(sys.argv[1])
holder = folder_lock.read_holder(path)
for count in range(300):
    path.write_text(folder_lock._text(replace(holder, count=count)))
    time.sleep(0.2)
"""


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.2)
    monkeypatch.setattr(folder_lock, "SILENCE", 3.0)


def _elsewhere() -> Holder:
    """A process of another machine."""
    return replace(Holder.this_process(), process="1.0 another machine", host="n7")


def _holder(folder: Path) -> Holder:
    holder = read_holder(folder / ".lock.json")
    assert holder is not None
    return holder


def test_a_folder_is_held_and_given_back(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"):
        assert _holder(tmp_path / "run").pid == os.getpid()
        (tmp_path / "run/file").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_lock_within_one_changes_nothing(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        with FolderLock(tmp_path):
            pass
        assert _holder(tmp_path).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stopped", [False, True])
def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path: Path, stopped: bool) -> None:
    """A process that was stopped still holds its folder; one that was killed does not."""
    with holding(tmp_path) as process:
        if stopped:
            process.send_signal(signal.SIGSTOP)
        message = rf"is being written by .* \(process {process.pid}, since"
        with pytest.raises(LockedError, match=message), FolderLock(tmp_path):
            pass
    with FolderLock(tmp_path):
        assert _holder(tmp_path).pid == os.getpid()


def test_one_that_wants_to_be_alone_is_refused_beside_others(tmp_path: Path) -> None:
    with holding(tmp_path, ".lock-1.json") as process:
        with FolderLock(tmp_path, ".lock-2.json"):
            pass
        with (
            pytest.raises(LockedError, match=rf"process {process.pid}, .* remove .*/\.lock-1\.json"),
            FolderLock(tmp_path, against=".lock-*.json"),
        ):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".lock-1.json"]
    with FolderLock(tmp_path, against=".lock-*.json"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LockedError, match=r"file/run cannot be written \(Not a directory\)"),
        FolderLock(tmp_path / "file/run"),
    ):
        pass
    with pytest.raises(ValueError, match=r"^wrong$"), FolderLock(tmp_path / "new"):
        raise ValueError("wrong")
    assert not (tmp_path / "new").exists()


def test_a_holder_on_another_machine_is_known_by_its_count(tmp_path: Path) -> None:
    """While it goes on a second one is refused; when it has stopped, the folder is taken over."""
    path = tmp_path / ".lock.json"
    path.write_text(folder_lock._text(_elsewhere()))
    process = subprocess.Popen([sys.executable, "-c", COUNTING, path])
    try:
        while (holder := read_holder(path)) is None or holder.count < 2:
            time.sleep(0.05)
        with pytest.raises(LockedError, match=r"is being written by .* on n7 "), FolderLock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with FolderLock(tmp_path):
        assert _holder(tmp_path).host != "n7"


def test_one_that_has_lost_its_folder_ends(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        (tmp_path / ".lock.json").write_text(folder_lock._text(_elsewhere()))
        assert process.wait(timeout=30) == LOST
    assert _holder(tmp_path).host == "n7"


def test_a_job_that_is_queued_again_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its old node may only be unreachable."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (tmp_path / ".lock.json").write_text(folder_lock._text(_elsewhere()))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(folder_lock, "SILENCE", 1000.0)
    with FolderLock(tmp_path):
        assert _holder(tmp_path).restarts == 1


def test_a_lock_that_was_cut_short_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock.json").write_text('{"token"')
    with FolderLock(tmp_path):
        assert asdict(_holder(tmp_path))["pid"] == os.getpid()
