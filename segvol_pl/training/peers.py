"""One voice: of the ranks of a run that fails, one reports why. Otherwise 512 logs end with 512 errors.

1. A rank that fails takes the word: it creates `run.out`/ranks/failed, and reports its error. All others fail after it,
   because their connections to it break; they find the file, and end without a line.
2. If all ranks fail alike, rank 0 has the word, whose log users read: the others leave it a moment to take it.
3. A rank whose connection broke, and that no other rank explains, names the ranks of its host whose processes have
   ended: such a rank was killed. If none has, another host or the network failed.

A rank that ends quietly has the exit status of its own error; `--debug` shows that.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from segvol_pl.atomic import claim
from segvol_pl.errors import LostRankError, status_of

log = logging.getLogger(__name__)

WORD = "failed"
"""The file that a rank creates to take the word."""
RANK_0_FIRST, LOCAL_FIRST, POLL = 2.0, 6.0, 0.1
"""Seconds for which other ranks leave the word to rank 0, and those of other hosts to those of the failed rank's host;
and between two looks."""
BROKEN = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What errors of a broken connection contain. Gloo raises a plain RuntimeError."""
SHOWN = 160
"""Characters kept of such an error."""


Place = dict[str, Any]
"""rank, host, pid and more, see `watchdog.Beat`."""


class Silent(SystemExit):
    """The end of a rank while another one reports why the run failed."""


@contextmanager
def one_voice(out: Path) -> Iterator[None]:
    """Let the block's error pass if this rank is to report it, and end the process quietly if not.

    Raises:
        LostRankError: instead of an error of a broken connection.
        Silent: another rank reports why the run failed.
    """
    try:
        yield
    except Exception as error:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            raise
        broken = connection_broke(error)
        gone = _gone_unless_explained(out / "ranks", broken)
        if gone is None:
            log.debug("another rank reports why the run failed; here it was", exc_info=error)
            raise Silent(status_of(error)) from error
        if broken:
            raise LostRankError(_lost(gone, error)) from error
        raise


def connection_broke(error: BaseException) -> bool:
    """Whether a rank failed only because it could no longer reach another one."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in BROKEN)


def gone_ranks(folder: Path, ranks: int) -> list[Place]:
    """Of so many ranks those of this host whose processes have ended: what `watchdog` wrote of them to `folder`."""
    found = []
    for rank in range(ranks):
        try:
            place = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if place["host"] == socket.gethostname() and _has_ended(place["pid"]):
            found.append(place)
    return found


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _gone_unless_explained(folder: Path, broken: bool) -> list[Place] | None:
    """None if another rank reports the failure; otherwise the ranks that are gone, if a connection broke."""
    begun, found = time.monotonic(), list[Place]()
    while not (folder / WORD).exists():
        # A process that is killed closes its connections a moment before it has ended.
        found = found or (gone_ranks(folder, dist.get_world_size()) if broken else [])
        patience = LOCAL_FIRST if broken and not found else 0.0 if dist.get_rank() == 0 else RANK_0_FIRST
        if time.monotonic() - begun >= patience:
            break
        time.sleep(POLL)
    return found if take_word(folder) else None


def take_word(folder: Path) -> bool:
    """Keep other ranks from reporting; return False if one does already."""
    try:
        return claim(folder / WORD)
    except OSError:  # on a full disk, or without one, several lines are better than none
        return True


def _lost(gone: list[Place], error: BaseException) -> str:
    if gone:
        named = ", ".join(f"rank {place['rank']} on {place['host']} (process {place['pid']})" for place in gone)
        return f"{named} ended without an error of its own: it was killed, or crashed: see its log, and `dmesg` there"
    text = " ".join(str(error).split())[:SHOWN]
    return f"the connection to a rank on another host broke: a host or the network failed ({text})"


def begin(out: Path) -> None:
    """Remove what an earlier start left. Rank 0 calls it before the ranks connect."""
    (out / "ranks" / WORD).unlink(missing_ok=True)
