"""Python stacks of loader processes, which the training process requests when a run hangs.

1. A loader process keeps a file in memory. On a signal faulthandler writes the stacks of its threads into it, in C: it
   also does so while the process waits for a disk or a network.
2. The training process sends the signal, and reads the file through /proc.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

SIGNAL = signal.SIGUSR2
NAME = "segvol-stacks"
PAUSE = 0.05
"""Seconds between two looks at the file."""


def answer_with_stacks() -> None:
    """Let this process answer `stacks_of`. Without files in memory, as on macOS, it does not answer."""
    if hasattr(os, "memfd_create"):
        faulthandler.register(SIGNAL, file=os.memfd_create(NAME), all_threads=True)


def stacks_of(pid: int, seconds: float) -> str:
    """The stacks of a process of this machine; empty if it does not answer within `seconds`.

    A process that never called `answer_with_stacks` gets no signal, which would end it. Raises OSError if it is gone.
    """
    files = Path(f"/proc/{pid}/fd")
    place = next((file for file in files.iterdir() if f"memfd:{NAME}" in str(file.readlink())), None)
    if place is None:
        return ""
    before = place.read_text(errors="replace")
    os.kill(pid, SIGNAL)
    deadline, found = time.monotonic() + seconds, before
    while time.monotonic() < deadline:
        time.sleep(PAUSE)
        earlier, found = found, place.read_text(errors="replace")
        # Unchanged since the last look: it is complete.
        if earlier == found != before:
            break
    return found[len(before) :]
