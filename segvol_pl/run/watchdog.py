"""A rank that hangs is named, and the job ends, instead of all others waiting for it until the time limit.

1. Every rank counts what it does (batches begun and ended, validation, saving) and a thread of it writes the count,
   with a tick that shows that the process lives, to a file of its own in the run folder.
2. A rank whose count has stood still for `timeout` seconds reads the others' files and names the rank that all wait
   for: the one that has done least, or else the one whose tick stands still.
3. It ends its process; SLURM, or whoever started the ranks, ends the others.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil

from segvol_pl.data.whole import write_text

log = logging.getLogger(__name__)

HUNG = 70
"""Exit status of a rank that ended because one hung (EX_SOFTWARE)."""
LOOKS = 10
"""Times that the count is looked at within the timeout."""

Beat = dict[str, Any]
"""rank, host, pid, done (what it did so far), tick."""


class Watchdog(pl.Callback):
    """Ends the process where nothing was done for `timeout` seconds. Files: `folder`/rank-N.json."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder, self.timeout = folder, timeout
        self.done = 0
        self.stopped = threading.Event()

    def _did(self, *arguments: Any, **named: Any) -> None:
        self.done += 1

    on_train_batch_start = on_train_batch_end = on_before_backward = on_before_optimizer_step = _did
    on_validation_batch_start = on_validation_batch_end = on_save_checkpoint = _did

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
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
            beat = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "done": done, "tick": tick}
            write_text(self._file(rank), json.dumps(beat))
            waited = time.monotonic() - since
            # The ticks are first read at half of the time: a process that lives has ticked again by its end.
            if waited > self.timeout / 2 and not before:
                before = self._beats(ranks)
            if waited > self.timeout:
                self._end(before, self._beats(ranks), ranks, waited)

    def _end(self, before: dict[int, Beat], now: dict[int, Beat], ranks: int, waited: float) -> None:
        names = "; ".join(suspects(before, now, ranks))
        log.error("nothing was done for %.0f s: waiting for %s: ending the job (run.timeout)", waited, names)
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
    """The ranks that the others wait for, described."""
    missing = [f"rank {rank}, which never began" for rank in range(ranks) if rank not in now]
    if missing:
        return missing
    still = [rank for rank, beat in now.items() if rank in before and before[rank]["tick"] == beat["tick"]]
    least = min(beat["done"] for beat in now.values())
    behind = [rank for rank, beat in now.items() if beat["done"] == least]
    named = still or (behind if len(behind) < ranks else [])
    described = [f"rank {rank} on {now[rank]['host']} (process {now[rank]['pid']})" for rank in named]
    return described or ["each other: no rank is behind"]
