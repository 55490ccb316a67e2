"""Names a rank that hangs and ends the job, instead of letting the other ranks wait until the time limit.

1. Every rank counts its progress (batches begun and ended, validation, saving). A thread writes the count to a file of
   the rank in the run folder, with a tick that shows that the process is alive.
2. A second thread compares the count with the clock. A rank without progress for `timeout` seconds, or whose checkpoint
   has been written in the background for longer, writes its post-mortem. Waiting ranks that see one write theirs.
3. One rank declares the hang: rank 0, or the first other rank if rank 0 does not. It waits a short time for the
   post-mortems of the others, and logs one line that names the rank that all wait for: one whose tick has stopped, or
   else the one with the least progress. All ranks end their processes.

Watched are one process or many, from the first validation to the last checkpoint. The thread that decides touches the
run folder within time limits only: the run may hang because its disk does not answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil

from segvol_pl.atomic import claim, write_text
from segvol_pl.errors import HUNG, listed
from segvol_pl.folder_lock import is_running
from segvol_pl.training import peers, postmortem
from segvol_pl.training.checkpoints import AtomicCheckpointIO
from segvol_pl.training.postmortem import in_time

log = logging.getLogger(__name__)

DECLARED = "declared"
"""The file in the post-mortem's folder that the rank which declares the hang creates."""
WAITS = re.compile(r"^\w+ \((?:torch/distributed|deepspeed/comm)/")
"""Begins where a rank stands that waits for other ranks."""
LOOKS = 10
"""How often the count is checked and written within the timeout, at least."""
TICK = 5.0
"""Most seconds between two checks."""
LEAST_GRACE, MOST_GRACE = 3.0, 60.0
"""Seconds that ranks wait for each other before they end. A file on a network disk is seen with a delay."""

Beat = dict[str, Any]
"""rank, host, pid, started (of the process), done (progress so far), after (the last completed operation), tick."""
Beats = dict[int, Beat]


def _noting(what: str) -> Callable[..., None]:
    """A hook that counts, and records the operation that it follows."""

    def note(self: Watchdog, trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        self.progress(what, trainer.global_step)

    return note


class Watchdog(pl.Callback):
    """End the process after `timeout` seconds without progress. Writes `out`/ranks/rank-N.json, `out`/postmortem/.

    ended: called by the rank that logs the line, with the line and the seconds without progress.
    """

    def __init__(self, out: Path, timeout: float, ended: Callable[[str, float], None]) -> None:
        self.folder, self.postmortem, self.timeout = out / "ranks", out / postmortem.FOLDER, timeout
        self.ended = ended
        self.tick = min(timeout / LOOKS, TICK)
        self.grace = min(max(timeout / 4, LEAST_GRACE), MOST_GRACE)
        self.done, self.after, self.step = 0, "the start", 0
        self.own: Beat = {}
        self.ranks, self.ticks = 1, 0
        self.keys: Callable[[], list[str]] = list
        self.saving: AtomicCheckpointIO | None = None
        self.stopped, self.ending = threading.Event(), threading.Event()
        self.stopped.set()

    on_train_batch_start = _noting("receiving a batch")
    on_before_backward = _noting("a forward pass")
    on_before_optimizer_step = _noting("a backward pass")
    on_train_batch_end = _noting("a batch")
    on_validation_batch_start = _noting("receiving a validation batch")
    on_validation_batch_end = _noting("a validation batch")
    on_validation_end = _noting("a validation")
    on_save_checkpoint = _noting("gathering a checkpoint")
    on_train_end = _noting("the last step")

    def progress(self, after: str, step: int) -> None:
        """Count an operation that is done."""
        self.done, self.after, self.step = self.done + 1, after, step

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if not self.stopped.is_set():
            return
        self.stopped.clear()
        self.ranks, io = trainer.world_size, trainer.strategy.checkpoint_io
        self.keys = trainer.datamodule.batch_keys  # type: ignore[attr-defined]
        self.saving = io if isinstance(io, AtomicCheckpointIO) else None
        started = psutil.Process().create_time()
        self.own = {"rank": trainer.global_rank, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stop watching: the run has ended. Does not return if the end after a hang has begun."""
        self.stopped.set()
        if self.ending.is_set():
            # An error that other ranks cause by ending would be another line, and another exit status.
            time.sleep(20 * self.grace)
        faulthandler.cancel_dump_traceback_later()

    # ---- while the run goes well ----

    def _beat(self) -> None:
        while True:
            # A full disk, or one that does not answer, is reported by what the run itself writes.
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / f"rank-{self.own['rank']}.json", json.dumps(self._now()))
            if self.stopped.wait(self.timeout / LOOKS):
                return
            self.ticks += 1

    def _now(self) -> Beat:
        return {**self.own, "done": self.done, "after": self.after, "tick": self.ticks}

    def _watch(self) -> None:
        done, waited, looked = -1, 0.0, time.monotonic()
        writing, written = None, 0.0
        before: Beats | None = None
        while not self.stopped.wait(self.tick):
            # Time in which the complete job was suspended, as SLURM can do, is not waiting.
            passed, looked = min(time.monotonic() - looked, 3 * self.tick), time.monotonic()
            waited, written = waited + passed, written + passed
            if self.done != done:
                done, waited, before = self.done, 0.0, None
            if self.saving is None or self.saving.writing is None or self.saving.writing != writing:
                writing, written = self.saving and self.saving.writing, 0.0
            # If a thread keeps the interpreter locked, this one stops too, and Python's stacks go to standard error.
            faulthandler.dump_traceback_later(self.timeout + self.grace, file=2)
            called = False
            if waited > self.timeout / 2 and self.ranks > 1:
                before = self._read() if before is None else before
                # Later than the ticks were first read: a live process has ticked again.
                called = bool(before) and waited > 0.8 * self.timeout and in_time(self._called, False)
            if called or max(waited, written) > self.timeout:
                saved = f"{writing[0]} is being written, for {written:.0f} s" if writing else ""
                self._end(before or {}, waited, saved, written)

    def _called(self) -> bool:
        """Whether another rank has written a post-mortem."""
        return any(self.postmortem.glob("rank-*.txt"))

    def _read(self) -> Beats:
        """What the ranks have written; empty if the disk does not answer."""
        nothing: Beats = {}
        return in_time(self._beats, nothing)

    def _beats(self) -> Beats:
        found: Beats = {self.own["rank"]: self._now()}
        for rank in set(range(self.ranks)) - set(found):
            with contextlib.suppress(OSError, json.JSONDecodeError):
                found[rank] = json.loads((self.folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
        return dict(sorted(found.items()))

    # ---- after a hang ----

    def _end(self, before: Beats, waited: float, saved: str, written: float) -> None:
        self.ending.set()
        # Should anything below keep the interpreter locked, as a call into a GPU's driver can.
        faulthandler.dump_traceback_later(10 * self.grace, exit=True, file=2)
        who = postmortem.Rank(self.own["rank"], self.ranks, self.own["host"], self.own["pid"])
        stall = postmortem.Stall(self.step, self.after, waited, saved, self.keys)
        reached = postmortem.write(self.postmortem, who, stall)
        own = f"{described(self._now())} in {in_time(postmortem.main_stands, '(unknown)')}"
        if not reached:
            place = f"{self.postmortem} cannot be written"
            self._say(f"no progress for {waited:.0f} s; stalled: {own}; {place}; aborting", waited)
        elif written > self.timeout:
            in_time(self._claim, False)
            self._report(f"rank {who.rank} on {who.host} (process {who.pid}): {saved}", written)
        elif self._elected():
            self._declare(before, waited)
        elif not self._wait((self.postmortem / postmortem.SUMMARY).exists, 3 * self.grace):
            gone = "the rank that was to name the stalled one is gone"
            self._say(f"no progress for {waited:.0f} s: {own}; {gone}", waited)
        if self._launched_by_rank(before):
            # Lightning's launcher kills its own process, and with it the job's exit status, if another rank ends first.
            time.sleep(self.grace)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(HUNG)

    def _launched_by_rank(self, beats: Beats) -> bool:
        """Whether another rank has started this process."""
        return any((beat["host"], beat["pid"]) == (self.own["host"], os.getppid()) for beat in beats.values())

    def _elected(self) -> bool:
        """Whether this rank declares the hang: rank 0 at once, others if no rank has done so within the grace."""
        declared = self.postmortem / DECLARED
        return not (self.own["rank"] > 0 and self._wait(declared.exists, self.grace)) and in_time(self._claim, False)

    def _claim(self) -> bool:
        """Keep other ranks from declaring the hang; return whether this rank was the first."""
        return claim(self.postmortem / DECLARED)

    def _declare(self, before: Beats, waited: float) -> None:
        """Name the ranks that all wait for."""
        now = self._read()
        stopped = silent(before, now)
        awaited = set(now) - set(stopped)
        self._wait(lambda: awaited <= self._written(), self.grace)
        places = {rank: in_time(partial(postmortem.read_stands, self.postmortem, rank), "") for rank in awaited}
        self._report(listed(suspects(before, now, self.ranks, places), "; "), waited)
        for rank in stopped:
            self._kill(now[rank])

    def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until `done`, for at most `seconds`; return whether it was."""
        deadline = time.monotonic() + seconds
        while not (found := in_time(done, False)) and time.monotonic() < deadline:
            time.sleep(self.tick / 4)
        return found

    def _report(self, named: str, waited: float) -> None:
        """Log the line that ends the job, and write it to a file for the other ranks."""
        wrote = in_time(lambda: len(self._written()), 0)
        line = (
            f"no progress for {waited:.0f} s; stalled: {named}; stacks of {wrote} of {self.ranks} ranks are in "
            f"{self.postmortem}; aborting (run.hang_timeout={self.timeout:.0f})"
        )
        in_time(lambda: write_text(self.postmortem / postmortem.SUMMARY, line + "\n"), None)
        # A rank that has not waited as long fails when this process ends.
        in_time(lambda: peers.take_word(self.folder), False)
        self._say(line, waited)

    def _written(self) -> set[int]:
        """The ranks whose post-mortem is complete."""
        return {rank for rank in range(self.ranks) if (self.postmortem / f"rank-{rank}.txt").exists()}

    def _say(self, line: str, waited: float) -> None:
        # The run folder and the log may lie on the disk that does not answer.
        in_time(partial(self.ended, line, waited), None)
        in_time(lambda: log.error("%s", line), None)

    def _kill(self, beat: Beat) -> None:
        """End a process of this host that does not run: no launcher may do so, as with a stopped rank 0."""
        with contextlib.suppress(psutil.Error, OSError):
            if beat["host"] == self.own["host"] and is_running(beat["pid"], beat["started"]):
                os.kill(beat["pid"], signal.SIGKILL)


def begin(out: Path) -> None:
    """Remove what an earlier start left: its ranks' files, and its post-mortem, which is moved aside."""
    for name in ("rank-*.json", ".rank-*.part"):
        for path in (out / "ranks").glob(name):
            path.unlink(missing_ok=True)
    postmortem.set_aside(out / postmortem.FOLDER)


@contextlib.contextmanager
def watched(trainer: pl.Trainer) -> Iterator[None]:
    """Stop the trainer's watchdog when the block ends: it watches from its first setup until then."""
    try:
        yield
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Watchdog):
                callback.stop()


def described(beat: Beat) -> str:
    """Name a rank, its host, its process and its last completed operation."""
    return f"rank {beat['rank']} on {beat['host']} (process {beat['pid']}, after {beat['after']})"


def silent(before: Beats, now: Beats) -> list[int]:
    """The ranks whose processes have not ticked in between."""
    return [rank for rank, beat in now.items() if rank in before and before[rank]["tick"] == beat["tick"]]


def suspects(before: Beats, now: Beats, ranks: int, stands: dict[int, str]) -> list[str]:
    """Describe the ranks that the others wait for.

    Args:
        before, now: what the ranks wrote at half of the timeout, and at its end.
        ranks: their number.
        stands: where the main thread of a rank stands, empty if it wrote no post-mortem.
    """
    missing = [f"rank {rank}, which never started" for rank in range(ranks) if rank not in now]
    if missing:
        return missing
    if still := silent(before, now):
        return [f"{described(now[rank])}: its process does not run" for rank in still]
    least = min(beat["done"] for beat in now.values())
    behind = [rank for rank, beat in now.items() if beat["done"] == least]
    places = {rank: f" in {place}" if (place := stands.get(rank)) else "" for rank in now}
    # All have completed the same operation: those are waited for that do not wait themselves.
    awaited = [rank for rank in behind if stands.get(rank) and not WAITS.match(stands[rank])]
    if len(behind) == ranks > 1 and 0 < len(awaited) < ranks:
        behind = awaited
    if len(behind) == ranks > 1:
        return [f"all ranks, after the same operation; {described(now[0])}{places[0]}"]
    return [f"{described(now[rank])}{places[rank]}" for rank in behind]
