"""Processes of their own that hold folders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDING = """
import sys, time
from pathlib import Path
from segvol_pl import folder_lock as lock
lock.BEAT = 0.2
with lock.FolderLock(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(300)
"""


@contextmanager
def holding(folder: Path, name: str = ".lock.json") -> Iterator[subprocess.Popen[str]]:
    """The process that holds `folder` while the block runs; killed at its end."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, folder, name], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
