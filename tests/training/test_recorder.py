"""The journal of real runs: what two ranks record when they are killed, signalled, hang or fail, and its goodput."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from factories import pretrain_config, train_config
from ranks import Ranks

from segvol_pl import goodput, journal
from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import HUNG, SIGNALLED, Cause, ConfigError
from segvol_pl.journal import Attempt
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.run import pretrain

STEPS, TIMEOUT = 150, 6.0
ONLY_RANK_1 = """
import time
import segvol_pl.training.callbacks as callbacks
end = callbacks.StreamPosition.on_train_batch_end
begun = []
def ended(self, trainer, *rest):
    end(self, trainer, *rest)
    begun.append(trainer.global_step)
    if trainer.global_rank == 1 and len(begun) == 6:
        {act}
callbacks.StreamPosition.on_train_batch_end = ended
"""


def _await(running: Ranks, out: Path, starts: int, reached: Callable[[Attempt], object]) -> None:
    deadline = time.monotonic() + 120
    while len(found := journal.read(out)) < starts or not reached(found[-1]):
        assert time.monotonic() < deadline, running.said()
        time.sleep(0.02)


@pytest.mark.slow
def test_the_time_of_a_run_with_four_interruptions_adds_up(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    """Killed, signalled, then one rank hangs, then one is out of memory; the fifth start comes to the end."""
    out, running = tmp_path / "run", ranks[2]
    config = train_config(phantom_shards, out, steps=STEPS)
    run = replace(config.run, checkpoint_every=1000, val_every=50, val_batches=1, hang_timeout=TIMEOUT)
    (tmp_path / "run.yaml").write_text(to_yaml(replace(config, run=run)))
    train = ["train", str(tmp_path / "run.yaml")]
    began = time.time()

    running.begin(*train)
    _await(running, out, 1, lambda start: start.progress)
    running.kill()
    running.end()
    running.begin(*train)
    _await(running, out, 2, lambda start: start.progress)
    os.kill(running.pids[0], signal.SIGTERM)
    assert running.end() == [SIGNALLED + signal.SIGTERM] * 2
    statuses, _ = running.ended(*train, patch=ONLY_RANK_1.format(act="time.sleep(1000)"))
    assert HUNG in statuses
    running.ended(*train, patch=ONLY_RANK_1.format(act="raise MemoryError('as if')"))
    running(*train)

    starts = journal.read(out)
    causes = [start.end.cause if start.end else None for start in starts]
    assert causes == [None, Cause.preempted, Cause.hang, Cause.out_of_memory, Cause.done]
    killed, signalled, hung, failed, done = starts
    assert (killed.kept, killed.start.step, signalled.start.step) == (0, 0, 0)
    assert hung.start.step == failed.start.step == done.start.step == signalled.kept > 0
    assert hung.end is not None and hung.end.why.startswith("no progress for ")
    assert failed.end is not None and (failed.end.rank, failed.end.why) == (1, "MemoryError: as if")
    assert hung.end.step == failed.end.step == signalled.kept + 5 and done.kept == STEPS

    spent = goodput.parts(starts, running=False)
    wall = done.ended_at - killed.start.began
    assert sum(astuple(spent)) == pytest.approx(wall, rel=0.01)
    assert began <= killed.start.began and done.ended_at <= time.time()
    assert min(astuple(spent)) > 0 and spent.hang > TIMEOUT
    by_start = [each for each, _ in goodput.each(starts, running=False)]
    assert [each.kept > 0 for each in by_start] == [False, True, False, False, True]
    assert by_start[0].lost > 0 and by_start[2].lost > 0 and by_start[4].lost == 0

    logged = {name: dict(read_metrics(out / "metrics.csv", f"goodput/{name}")) for name in spent.shares()}
    steps = list(logged["kept"])
    assert set(steps) >= {100, STEPS} and all(list(values) == steps for values in logged.values())
    for step in steps:
        assert sum(values[step] for values in logged.values()) == pytest.approx(1)
    assert logged["kept"][STEPS] <= spent.shares()["kept"] + 0.01
    assert signalled.end is not None and signalled.end.why == "SIGTERM"
    row = goodput.describe(out)
    assert row["interrupted by"] == "crash 1, hang 1, out of memory 1, preempted 1"
    assert (row["state"], row["step"], row["starts"]) == ("done", f"{STEPS}/{STEPS}", "5")


def test_a_run_records_its_steps_saves_and_end(phantom_shards: Path, tmp_path: Path) -> None:
    """Two of them in one process, of which the second one is made longer and then refused."""
    for name in ("first", "second"):
        pretrain(pretrain_config(phantom_shards, tmp_path / name, steps=4))
    longer = pretrain_config(phantom_shards, tmp_path / "second", steps=6)
    pretrain(longer)
    first, second = journal.read(tmp_path / "first"), journal.read(tmp_path / "second")
    (start,) = first
    assert start.first is not None and start.first.step == 1 and start.first.validation > 0
    assert [(each.step, each.file) for each in start.saved if each.file == "last.ckpt"] == [
        (3, "last.ckpt"),
        (4, "last.ckpt"),
    ]
    assert all(each.taken <= each.at for each in start.saved)
    assert start.end is not None and (start.end.cause, start.end.step, start.end.status) == (Cause.done, 4, 0)
    assert start.ended_at <= second[0].start.began <= second[0].ended_at <= second[1].start.began
    assert [(each.start.step, each.start.max_steps) for each in second] == [(0, 4), (4, 6)]
    before = (tmp_path / "second" / journal.JOURNAL).read_bytes()
    with pytest.raises(ConfigError):
        pretrain(replace(longer, optim=replace(longer.optim, lr=5e-4)))
    assert (tmp_path / "second" / journal.JOURNAL).read_bytes() == before, "the run is as it was"
