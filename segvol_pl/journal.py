"""The journal of a run folder: every start of the run, its progress, what it saved, and why it ended. Needs no torch.

1. Rank 0 appends lines to `journal.jsonl`, one JSON object each: `start`, `first` (the first step is done), `progress`,
   `saved` (a checkpoint is on the disk) and `end`. A line is one write, so that a killed run leaves at most its last
   line incomplete; the reader skips such a line.
2. Another rank that fails writes its end to a file of its own in `ends/`: appending to one file from several hosts is
   not safe on network file systems.
3. The reader puts the lines of each start together. Of the ends of several ranks, the one that explains the others
   counts: a rank that ran out of memory, not the ranks whose connection to it broke.

Times are seconds since the epoch by the clock of the host that writes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from segvol_pl import slurm_job
from segvol_pl.atomic import write_text
from segvol_pl.errors import STATUSES, Cause
from segvol_pl.launched import PROCESS, command_since

log = logging.getLogger(__name__)

JOURNAL, ENDS = "journal.jsonl", "ends"
EXPLAINS = (
    Cause.done,
    Cause.preempted,
    Cause.configuration,
    Cause.out_of_memory,
    Cause.non_finite,
    Cause.hang,
    Cause.node_lost,
    Cause.crash,
)
"""Which of the causes that several ranks give is that of the start: the first in this order."""
LONGEST = 500
"""Characters kept of why a start ended."""


@dataclass(frozen=True)
class Start:
    """The beginning of one start."""

    at: float
    began: float
    """When its command began, which is before the imports."""
    step: int
    """The step that it resumes from."""
    max_steps: int
    host: str = ""
    job: str = ""
    """SLURM job; empty outside of SLURM."""
    restarts: int = 0
    """How often SLURM had started the job again."""
    queued_since: float | None = None
    """When the job began to wait for this start; None if unknown."""
    job_started: float | None = None
    """When the job got its nodes; None if unknown."""


@dataclass(frozen=True)
class Mark:
    """How far a start had come at a time."""

    at: float
    step: int
    validation: float = 0.0
    """Seconds of this start that validation has taken so far."""
    saving: float = 0.0
    """Seconds of this start for which training has waited for saving so far."""


@dataclass(frozen=True)
class Saved(Mark):
    """A checkpoint on the disk: its step, and the seconds at the moment at which its content was taken."""

    file: str = ""
    taken: float = 0.0
    """When its content was taken, which is before training continued; `at` is when it was on the disk."""


@dataclass(frozen=True)
class End(Mark):
    """Why a start ended, as one rank saw it."""

    cause: Cause = Cause.crash
    status: int = 1
    why: str = ""
    """One line."""
    stalled: float = 0.0
    """Seconds without progress before the end (hang)."""
    rank: int | None = 0
    """None: recorded by the job, whose ranks left no record."""
    host: str = ""
    job: str = ""
    restarts: int = 0


@dataclass
class Attempt:
    """One start of a run, and what is known of it."""

    start: Start
    first: Mark | None = None
    """When the first step was done."""
    progress: list[Mark] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)

    @property
    def end(self) -> End | None:
        """The end that explains the others, at the earliest step of those with the same cause."""
        found = min(self.ends, key=lambda end: (EXPLAINS.index(end.cause), end.rank or 0, end.at), default=None)
        if found is None:
            return None
        alike = [end.step for end in self.ends if end.cause is found.cause]
        return dataclasses.replace(found, step=min(alike))

    def interrupted_by(self, following: Attempt) -> Cause:
        """Why this start ended, given the next one: without a record a lost node, if SLURM started the job again."""
        if self.end is not None:
            return self.end.cause
        ours, theirs = self.start, following.start
        again = ours.job == theirs.job != "" and theirs.restarts > ours.restarts
        return Cause.node_lost if again else Cause.crash

    @property
    def marks(self) -> list[Mark]:
        """All records that state how far the start had come."""
        ended = [self.end] if self.end else []
        return [*([self.first] if self.first else []), *self.progress, *self.saved, *ended]

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        return max((mark.step for mark in self.marks), default=self.start.step)

    @property
    def kept(self) -> int:
        """The step of the newest checkpoint on the disk: that of its last save, or the one that it resumed from."""
        return max((saved.step for saved in self.saved), default=self.start.step)

    @property
    def ended_at(self) -> float:
        """Time of the last record."""
        return max((mark.at for mark in self.marks), default=self.start.at)


# ---- reading ----

KINDS: dict[str, type[Start | Mark]] = {"start": Start, "first": Mark, "progress": Mark, "saved": Saved, "end": End}


def read(folder: Path) -> list[Attempt]:
    """All starts of the run in `folder`, oldest first; empty if it has no journal."""
    attempts: list[Attempt] = []
    path = folder / JOURNAL
    for line in path.read_bytes().splitlines() if path.exists() else ():
        event, record = _parsed(line)
        if isinstance(record, Start):
            attempts.append(Attempt(record))
        elif record is not None and attempts:
            _add(attempts[-1], event, record)
    for path in sorted((folder / ENDS).glob("*.json")) if attempts else ():
        _, record = _parsed(path.read_bytes())
        if isinstance(record, End):
            _add_foreign(attempts, record)
    return attempts


def _parsed(line: bytes) -> tuple[str, Start | Mark | None]:
    """The event of a line and its record; None for a line that is incomplete, or of a later version."""
    try:
        content = json.loads(line)
        event = content.pop("event")
        kind = KINDS[event]
        known = {each.name for each in dataclasses.fields(kind)}
        values = {name: value for name, value in content.items() if name in known}
        if "cause" in values:
            values["cause"] = Cause(values["cause"])
        return event, kind(**values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", None


def _add(attempt: Attempt, event: str, record: Mark) -> None:
    if isinstance(record, End):
        attempt.ends.append(record)
    elif isinstance(record, Saved):
        attempt.saved.append(record)
    elif event == "first":
        attempt.first = record
    else:
        attempt.progress.append(record)


def _add_foreign(attempts: list[Attempt], end: End) -> None:
    """Add the end that another rank recorded to the start that it belongs to, if that is in the journal."""
    for attempt in reversed(attempts):
        start = attempt.start
        if start.at <= end.at and (start.job, start.restarts) == (end.job, end.restarts):
            attempt.ends.append(end)
            return


# ---- writing ----


class Journal:
    """Writes what happens in one start. Rank 0 writes every event, another rank only its own failure.

    A full disk does not end the run: the lines are kept, and written with the next one.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.attempts: list[Attempt] = []
        """Rank 0: all starts of the run; the last one is this one."""
        self.unwritten = b""
        self.writing = threading.Lock()
        self.ended = False

    def start(self, step: int, max_steps: int, resume: bool) -> None:
        """Record that this start begins. A new run (not `resume`) begins a new journal."""
        if self.rank:
            return
        if not resume:
            set_aside(self.folder)
        now, times = time.time(), slurm_job.queue_times()
        place = socket.gethostname(), slurm_job.job_name(), slurm_job.restarts()
        started = Start(now, min(now, _command_began(now)), step, max_steps, *place, *(times or (None, None)))
        self._write("start", started)
        self.attempts = [*read(self.folder)[:-1], Attempt(started)]
        # Another training of the same process begins when it is recorded.
        command_since.set(math.inf)

    def mark(self, event: str, mark: Mark) -> None:
        """Record the first step, progress or a saved checkpoint. Only rank 0 writes it."""
        if self.rank or not self.attempts:
            return
        self._write(event, mark)
        _add(self.attempts[-1], event, mark)

    def end(self, cause: Cause, mark: Mark, why: str = "", status: int | None = None, stalled: float = 0.0) -> None:
        """Record why this rank ends, once: what follows from it is not recorded."""
        # All ranks agree on these, of which rank 0 records one.
        if self.ended or (self.rank and cause in (Cause.done, Cause.preempted, Cause.non_finite)):
            return
        self.ended = True
        end = End(
            **asdict(mark),
            cause=cause,
            status=STATUSES[cause] if status is None else status,
            why=" ".join(why.split())[:LONGEST],
            stalled=stalled,
            rank=self.rank,
            host=socket.gethostname(),
            job=slurm_job.job_name(),
            restarts=slurm_job.restarts(),
        )
        if self.rank:
            name = f"{time.time_ns() // 1000}-rank-{self.rank}-{secrets.token_hex(2)}.json"
            attempted(lambda: write_end(self.folder / ENDS / name, end), self.folder / ENDS)
        elif self.attempts:
            self._write("end", end)
            self.attempts[-1].ends.append(end)

    def _write(self, event: str, record: Start | Mark) -> None:
        with self.writing:
            self.unwritten += line_of(event, record)
            path = self.folder / JOURNAL
            if attempted(lambda: append(path, self.unwritten), path):
                self.unwritten = b""


def _command_began(now: float) -> float:
    """When the command of this process began; `now` if it is not known, as for training from Python."""
    since = command_since.get(now)
    return psutil.Process().create_time() if since == PROCESS else since


def line_of(event: str, record: Start | Mark) -> bytes:
    """A line of the journal."""
    values = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(record).items()}
    return (json.dumps({"event": event, **values}) + "\n").encode()


def append(path: Path, lines: bytes) -> None:
    """Append complete lines in one write. An incomplete last line of a killed run is ended first."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        written = os.write(descriptor, lines)
        if written < len(lines):
            os.ftruncate(descriptor, size)
            raise OSError(f"only {written} of {len(lines)} bytes could be written")
    finally:
        os.close(descriptor)


def write_end(path: Path, end: End) -> None:
    """Write the end that a rank other than 0 saw."""
    path.parent.mkdir(exist_ok=True)
    write_text(path, line_of("end", end).decode())


def attempted(act: Callable[[], object], path: Path) -> bool:
    """Whether `act` worked: a record that cannot be written must not end the run."""
    try:
        act()
    except OSError as error:
        log.warning("%s: not written: %s", path, error.strerror or error)
        return False
    return True


def set_aside(folder: Path) -> None:
    """Rename the journal of an earlier run in the same folder."""
    number = 1 + len(list(folder.glob("journal-earlier-*.jsonl")))
    if (folder / JOURNAL).exists():
        (folder / JOURNAL).rename(folder / f"journal-earlier-{number}.jsonl")
