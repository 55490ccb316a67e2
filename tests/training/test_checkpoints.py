"""Writing checkpoints while training goes on: the state of the moment, whole files, errors that are not lost."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import pretrain_config
from lightning.pytorch.strategies import Strategy
from ranks import Ranks

from segvol_pl.config.loader import to_yaml
from segvol_pl.training import checkpoints
from segvol_pl.training.checkpoints import AtomicCheckpointIO, remove_parts
from segvol_pl.training.run import pretrain


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing begins when this is set."""
    event, save = threading.Event(), torch.save

    def wait_and_save(*arguments: Any) -> None:
        assert event.wait(30)
        save(*arguments)

    monkeypatch.setattr(checkpoints.torch, "save", wait_and_save)
    return event


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path: Path, held: threading.Event) -> None:
    io, weight = AtomicCheckpointIO(), torch.zeros(3)
    io.save_checkpoint({"state_dict": {"weight": weight}, "steps": [1]}, tmp_path / "last.ckpt")
    weight += 1
    assert not (tmp_path / "last.ckpt").exists(), "saving returns before the file is there"
    held.set()
    io.wait()
    written = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(written["state_dict"]["weight"], torch.zeros(3)) and written["steps"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_follows_a_checkpoint_is_done_when_it_is_there(tmp_path: Path, held: threading.Event) -> None:
    io, found = AtomicCheckpointIO(), []
    io.save_checkpoint({}, tmp_path / "step-1.ckpt")
    io.afterwards(lambda: found.extend(tmp_path.glob("*.ckpt")))
    assert not found
    held.set()
    io.wait()
    assert [path.name for path in found] == ["step-1.ckpt"]


@pytest.mark.parametrize("ask", ["check", "wait", "teardown", "save_checkpoint"])
def test_an_error_of_writing_is_raised_and_the_last_checkpoint_stays(
    tmp_path: Path, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    io.wait()

    def disk_full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", disk_full)
    io.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    checkpoints.wait(io.pending)
    with pytest.raises(OSError, match=r"last\.ckpt: no space left on the disk"):
        getattr(io, ask)(*([{}, tmp_path / "next.ckpt"] if ask == "save_checkpoint" else []))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}


def test_what_a_killed_run_had_half_written_is_removed(tmp_path: Path) -> None:
    for name in (".last.ckpt.77.part", "last.ckpt", "step-3.ckpt"):
        (tmp_path / name).write_bytes(b"")
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step-3.ckpt"]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is saved, at which step, and when the trainer takes a run down, in order."""
    done: list[str] = []
    save, teardown = AtomicCheckpointIO.save_checkpoint, Strategy.teardown

    def saved(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, *options: Any, **named: Any) -> None:
        done.append(f"{Path(path).name} {checkpoint['global_step']}")
        save(self, checkpoint, path, *options, **named)

    def torn_down(self: Strategy) -> None:
        done.append("teardown")
        teardown(self)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", saved)
    monkeypatch.setattr(Strategy, "teardown", torn_down)
    return done


def test_the_end_is_saved_before_the_weights_leave_their_device(
    phantom_shards: Path, tmp_path: Path, done: list[str]
) -> None:
    """The trainer's teardown brings them to main memory, where the ranks of GPUs cannot gather them any more."""
    pretrain(pretrain_config(phantom_shards, tmp_path / "run", steps=2))
    assert done == ["teardown", "last.ckpt 2", "teardown"], "of the validation before the first step, then of training"


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [3, 5]), (1e-9, [1, 2, 3, 4, 5])])
def test_a_checkpoint_is_due_by_the_clock_as_well(
    phantom_shards: Path, tmp_path: Path, done: list[str], minutes: float, steps: list[int]
) -> None:
    """The shorter of the two is over before the next step."""
    config = pretrain_config(phantom_shards, tmp_path / "run", steps=5)
    run = replace(config.run, checkpoint_minutes=minutes, checkpoint_every=3, val_batches=0)
    pretrain(replace(config, run=run))
    assert [entry for entry in done if entry != "teardown"] == [f"last.ckpt {step}" for step in steps]


@pytest.mark.parametrize(("clock", "saves"), [("0", 3), ("1", 1)])
def test_all_ranks_go_by_the_clock_of_rank_0(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], clock: str, saves: int
) -> None:
    """One rank alone finds a checkpoint to be due before every step; saving takes all of them."""
    patch = (
        "import os, segvol_pl.training.checkpoints as c\n"
        f"c.Checkpoints.overdue = lambda self: os.environ['LOCAL_RANK'] == '{clock}'\n"
        "write = c.AtomicCheckpointIO._write\n"
        "def written(checkpoint, path):\n"
        "    print('SAVED', checkpoint['global_step'], flush=True)\n"
        "    write(checkpoint, path)\n"
        "c.AtomicCheckpointIO._write = staticmethod(written)\n"
    )
    config = pretrain_config(phantom_shards, tmp_path / "run", steps=3)
    (tmp_path / "config.yaml").write_text(to_yaml(replace(config, run=replace(config.run, checkpoint_every=100))))
    said = ranks[2]("pretrain", str(tmp_path / "config.yaml"), "run.val_batches=0", patch=patch)
    assert said.count("SAVED") == saves and "SAVED 3" in said
