"""Ranks that start fast: processes forked from ones that have imported everything, which takes most of a start."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

FORKING = """
import atexit, gc, importlib.util, json, os, sys, threading, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import segvol_pl.training.run
from segvol_pl.__main__ import main
if importlib.util.find_spec("deepspeed"):
    import deepspeed.runtime.engine, torch._functorch.partitioners, torch._inductor.compile_fx
    import torch.utils.cpp_extension
def ended(patch, arguments):
    status = 1
    try:
        exec(patch, {})
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status or 0
gc.freeze()
for line in sys.stdin:
    port, patch, arguments = json.loads(line)
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["MASTER_PORT"] = port
        os._exit(ended(patch, arguments))
    print(pid, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""
"""What libraries print goes to the log, so that standard output holds process numbers and exit statuses alone.

A rank ends as the processes of `multiprocessing` do, without taking the interpreter apart, and its objects are frozen:
both would copy every page that it shares with the process that it was forked from, which takes seconds.
"""

GRACE = 10.0
"""Seconds that a rank has to notice that another one has failed."""


class Ranks:
    """`number` ranks, each a process of its own, anew for every run; started as by a launcher, not by Lightning's."""

    def __init__(self, folder: Path, number: int) -> None:
        self.logs = [folder / f"{rank}-of-{number}.log" for rank in range(number)]
        self.forking: list[subprocess.Popen[str]] = []
        self.pids: list[int] = []
        self.killed: set[int] = set()
        self.ended_at: list[float] = []

    def __call__(self, *arguments: str, patch: str = "") -> str:
        """`segvol-pl *arguments`, on all ranks without error; what rank 0 said on stderr. Training gets run.devices.

        patch: Python that each rank runs before.
        """
        statuses, said = self.ended(*arguments, patch=patch)
        assert not any(statuses), "\n".join(text[-2000:] for text in said)
        return said[0]

    def ended(self, *arguments: str, patch: str = "") -> tuple[list[int], list[str]]:
        """Exit status of each rank, and what it said on stderr."""
        self.begin(*arguments, patch=patch)
        return self.end(), self.said()

    def begin(self, *arguments: str, patch: str = "") -> None:
        """Starts the ranks; `pids` holds their process numbers."""
        if not self.forking:
            self._prepare()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.before = [log.stat().st_size for log in self.logs]
        devices = [f"run.devices={len(self.logs)}"] if arguments[0] in ("train", "pretrain") else []
        for process in self.forking:
            assert process.stdin is not None
            process.stdin.write(json.dumps([port, patch, [*arguments, *devices]]) + "\n")
            process.stdin.flush()
        self.pids = [self._answer(process) for process in self.forking]

    def said(self) -> list[str]:
        """What each rank has said on stderr since it was begun."""
        return [log.read_text()[start:] for log, start in zip(self.logs, self.before, strict=True)]

    def kill(self, *ranks: int) -> None:
        """With the loader processes that they started; none named: all."""
        for rank in ranks or range(len(self.pids)):
            with suppress(ProcessLookupError):
                os.killpg(self.pids[rank], signal.SIGKILL)

    def end(self, grace: float = GRACE, limit: float | None = None) -> list[int]:
        """Waits for all ranks; their exit statuses.

        Where one fails, those that have not ended `grace` seconds later are killed, as srun does, and after `limit`
        seconds without a failure all of them: `killed` holds them, `ended_at` when each ended (s since the epoch).
        """
        waiting = {process.stdout: rank for rank, process in enumerate(self.forking)}
        statuses, self.killed, self.ended_at = [0] * len(waiting), set(), [0.0] * len(waiting)
        while waiting:
            answered, _, _ = select.select(list(waiting), [], [], grace if any(statuses) else limit)
            for stream in answered:
                rank = waiting.pop(stream)
                statuses[rank], self.ended_at[rank] = self._answer(self.forking[rank]), time.time()
            if not answered:
                self.killed |= set(waiting.values())
                self.kill()
        self.pids = []
        return statuses

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> int:
        """The next number that it answers. Raises ValueError if it has ended."""
        assert process.stdout is not None
        line = b""
        # Not by its buffer: `select` does not see a number that is there already.
        while not line.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
            line += byte
        return int(line)

    def _prepare(self) -> None:
        place = {**os.environ, "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}
        for rank, log in enumerate(self.logs):
            with log.open("a") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-c", FORKING],
                    env={**place, "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            self.forking.append(process)

    def stop(self) -> None:
        if self.pids:
            self.kill()
        for process in self.forking:
            process.kill()
            process.wait()
