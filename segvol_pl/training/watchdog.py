"""Names a rank that hangs and ends the job, instead of letting the other ranks wait until the time limit.

1. Every rank counts its progress (batches begun and ended, validation, saving). A thread writes the count to a file of
   the rank in the run folder, with a tick that shows that the process is alive. The first validation, before training,
   is watched too, and so is a run of one process.
2. A rank without progress for `timeout` seconds reads the files of the others, and names the rank that they wait for:
   one whose tick has stopped, or else the one with the least progress; and its last completed operation.
3. It ends its process. SLURM, or whatever started the ranks, ends the others.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil

from segvol_pl.atomic import write_text
from segvol_pl.errors import HUNG

log = logging.getLogger(__name__)

LOOKS = 10
"""How often the count is checked within the timeout."""

Beat = dict[str, Any]
"""rank, host, pid, done (progress so far), after (the last completed operation), tick."""


def _noting(what: str) -> Callable[..., None]:
    """A hook that counts, and records the operation that it follows."""

    def note(self: Watchdog, *arguments: Any, **named: Any) -> None:
        self.done, self.after = self.done + 1, what

    return note


class Watchdog(pl.Callback):
    """End the process after `timeout` seconds without progress. Files: `folder`/rank-N.json.

    ended: called before that, with what stalled and for how long (s).
    """

    def __init__(self, folder: Path, timeout: float, ended: Callable[[str, float], None]) -> None:
        self.folder, self.timeout, self.ended = folder, timeout, ended
        self.done, self.after = 0, "the start"
        self.stopped = threading.Event()
        self.stopped.set()

    on_train_batch_start = _noting("receiving a batch")
    on_before_backward = _noting("a forward pass")
    on_before_optimizer_step = _noting("a backward pass")
    on_train_batch_end = _noting("a batch")
    on_validation_batch_start = _noting("receiving a validation batch")
    on_validation_batch_end = _noting("a validation batch")
    on_save_checkpoint = _noting("gathering a checkpoint")

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if not self.stopped.is_set():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stopped.clear()
        threading.Thread(target=self._watch, args=(trainer.global_rank, trainer.world_size), daemon=True).start()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.stopped.set()

    def _watch(self, rank: int, ranks: int) -> None:
        done, since, tick = -1, time.monotonic(), 0
        before: dict[int, Beat] = {}
        while not self.stopped.wait(self.timeout / LOOKS):
            tick += 1
            if self.done != done:
                done, since, before = self.done, time.monotonic(), {}
            who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
            beat = {**who, "done": done, "after": self.after, "tick": tick}
            write_text(self._file(rank), json.dumps(beat))
            waited = time.monotonic() - since
            # Ticks are first read at half of the timeout: a live process has ticked again by the end.
            if waited > self.timeout / 2 and not before:
                before = self._beats(ranks)
            if waited > self.timeout:
                self._end(before, self._beats(ranks), ranks, waited)

    def _end(self, before: dict[int, Beat], now: dict[int, Beat], ranks: int, waited: float) -> None:
        names = "; ".join(suspects(before, now, ranks))
        log.error("no progress for %.0f s; stalled: %s; aborting (run.hang_timeout=%.0f)", waited, names, self.timeout)
        self.ended(f"no progress for {waited:.0f} s; stalled: {names}", waited)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(HUNG)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _beats(self, ranks: int) -> dict[int, Beat]:
        found = {}
        for rank in range(ranks):
            try:
                found[rank] = json.loads(self._file(rank).read_text(encoding="utf-8"))
            except (OSError, json.JSONDecodeError):
                continue
        return found


def suspects(before: dict[int, Beat], now: dict[int, Beat], ranks: int) -> list[str]:
    """Describe the ranks that the others wait for."""
    missing = [f"rank {rank}, which never started" for rank in range(ranks) if rank not in now]
    if missing:
        return missing
    still = [rank for rank, beat in now.items() if rank in before and before[rank]["tick"] == beat["tick"]]
    least = min(beat["done"] for beat in now.values())
    behind = [rank for rank, beat in now.items() if beat["done"] == least]
    named = still or (behind if len(behind) < ranks else [])
    described = [
        f"rank {rank} on {now[rank]['host']} (process {now[rank]['pid']}, after {now[rank]['after']})"
        for rank in named or (range(1) if ranks == 1 else ())
    ]
    return described or ["all ranks, at the same operation"]
