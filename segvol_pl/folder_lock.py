"""One writer per folder: a second one is refused within seconds, with the name of the holder.

1. The holder writes a lock file (user, host, process, SLURM job, a random token) and increments a count in it.
2. A process that finds a lock checks whether its holder is alive: on the same machine by its process, elsewhere by its
   count, which changes every few seconds. A requeued SLURM job takes over from its earlier start without a check.
3. A lock whose holder is gone is taken over. If the holder was only unreachable, it finds another token in the file and
   exits before it writes anything else.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

import psutil

from segvol_pl.errors import LOST, LockedError

log = logging.getLogger(__name__)

LOCK = ".lock.json"
"""Name of the lock file of a folder with one writer."""
BEAT = 4.0
"""Seconds between two increments of the count."""
SILENCE = 3 * BEAT
"""Seconds without a new count after which a holder on another machine counts as gone."""
SILENT = 60.0
"""Seconds since the last count after which `seems_alive` takes a holder on another machine for gone: network file
systems show the time of a change late."""
SETTLE = 0.3
"""Seconds to wait after a takeover: if several take over at once, the last writer has won by then."""


held: set[Path] = set()
"""The lock files that this process holds."""


@dataclass(frozen=True)
class Holder:
    """The holder of a folder."""

    token: str
    user: str
    host: str
    pid: int
    process: str
    """Start time of the process, boot id and pid namespace of its machine: unique to one process."""
    job: str
    restarts: int
    """How often SLURM has requeued the job."""
    since: str
    count: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """This process, with a new token."""
        return cls(
            token=secrets.token_hex(8),
            user=_user(),
            host=socket.gethostname(),
            pid=os.getpid(),
            process=f"{psutil.Process().create_time()} {_machine()}",
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"{self.user} on {self.host} (process {self.pid}{job}, since {self.since})"


class FolderLock:
    """Hold `folder` for this process while the block runs. Nested locks of the same folder have no effect.

    Args:
        folder: the folder, which is created if it does not exist.
        name: name of the lock file; processes that may share a folder (parts, ranks) have one each.
        against: pattern of further lock files in the folder that no other process may hold.

    Raises:
        LockedError: another process holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, name: str = LOCK, against: str = "") -> None:
        self.folder, self.path, self.against = folder, folder / name, against
        self.own = Holder.this_process()
        self.released = threading.Event()

    def __enter__(self) -> FolderLock:
        self.inner = self.path.resolve() in held
        if self.inner:
            return self
        self.made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            created = self._created()
        except OSError as error:
            raise LockedError(
                f"{self.folder} cannot be written ({error.strerror}): fix that, or choose another folder"
            ) from error
        if not created:
            self._take_over()
        try:
            self._refuse(sorted(set(self.folder.glob(self.against)) - {self.path}) if self.against else [])
        except LockedError:
            self._give_back()
            raise
        held.add(self.path.resolve())
        self.counting = threading.Thread(target=self._count, daemon=True)
        self.counting.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.inner:
            return
        self.released.set()
        self.counting.join()
        self._give_back()

    def _give_back(self) -> None:
        held.discard(self.path.resolve())
        if (holder := read_holder(self.path)) and holder.token == self.own.token:
            self.path.unlink(missing_ok=True)
        if self.made:
            with contextlib.suppress(OSError):  # no longer empty
                self.folder.rmdir()

    def _created(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_text(self.own))
        return True

    def _take_over(self) -> None:
        if read_holder(self.path) is None:
            time.sleep(SETTLE)  # its holder may not have written it yet
        holder = read_holder(self.path)
        self._refuse([self.path])
        log.warning("%s: taken over from %s, which is gone", self.folder, holder or "a process that died at its start")
        self.path.write_text(_text(self.own), encoding="utf-8")
        time.sleep(SETTLE)
        if (other := read_holder(self.path)) is None or other.token != self.own.token:
            raise LockedError(f"{self.folder} was taken by {other} at the same moment: wait for it")

    def _refuse(self, paths: list[Path]) -> None:
        if found := living(paths, self.own):
            path, holder = found
            raise LockedError(
                f"{self.folder} is being written by {holder}: wait for it, or choose another folder (if it is gone for "
                f"good, remove {path})"
            )

    def _count(self) -> None:
        count = 0
        while not self.released.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # an unreachable or full disk: training reports it
                holder = read_holder(self.path)
                if holder is None or holder.token != self.own.token:
                    self._lost(holder)
                # In place: over NFS new content becomes visible sooner than a rename.
                with self.path.open("r+", encoding="utf-8") as file:
                    file.write(_text(Holder(**{**asdict(self.own), "count": count})))

    def _lost(self, holder: Holder | None) -> None:
        log.error("%s is now held by %s: exiting", self.folder, holder or "nobody: its lock was removed")
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(LOST)


def living(paths: list[Path], own: Holder) -> tuple[Path, Holder] | None:
    """The first lock whose holder is alive; takes seconds if the holder is on another machine."""
    elsewhere: dict[Path, Holder] = {}
    for path in paths:
        if (holder := read_holder(path)) is None or (holder.job == own.job != "" and holder.restarts < own.restarts):
            continue
        start, _, machine = holder.process.partition(" ")
        if machine != _machine():
            elsewhere[path] = holder
        elif is_running(holder.pid, float(start)):
            return path, holder
    deadline = time.monotonic() + SILENCE
    while elsewhere and time.monotonic() < deadline:
        time.sleep(BEAT / 4)
        for path, holder in elsewhere.items():
            if (now := read_holder(path)) is not None and now != holder:
                return path, now
    return None


def seems_alive(path: Path) -> bool:
    """Whether the lock has a holder that seems to be alive. Answers at once: for a list, not for taking over."""
    if (holder := read_holder(path)) is None:
        return False
    start, _, machine = holder.process.partition(" ")
    if machine == _machine():
        return is_running(holder.pid, float(start))
    return time.time() - path.stat().st_mtime < SILENT


def is_running(pid: int, started: float) -> bool:
    """Whether the process `pid` of this machine that started at `started` (s since the epoch) is running."""
    try:
        # Pids are reused; a start within the clock's resolution of the recorded one is the same process.
        return bool(abs(psutil.Process(pid).create_time() - started) < 1)
    except psutil.NoSuchProcess:
        return False


def read_holder(path: Path) -> Holder | None:
    """The holder of a lock; None if there is no lock file, or if it is not written yet."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _text(holder: Holder) -> str:
    """The holder as JSON, of the same length for any count, so that it can be overwritten in place."""
    return json.dumps({**asdict(holder), "count": 0}).replace('"count": 0', f'"count": {holder.count:<9d}')


def _machine() -> str:
    """Boot id of this kernel, and the pid namespace, which differs between containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    table = Path("/proc/self/ns/pid")
    booted = boot.read_text(encoding="utf-8").strip() if boot.exists() else socket.gethostname()
    return f"{booted} {table.readlink() if table.exists() else ''}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return f"user {os.getuid()}"
