"""Whether the SLURM job of a run that failed is queued again, from the run's journal. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segvol_pl.errors import LOST, STATUSES, Cause
from segvol_pl.journal import JOURNAL, Attempt, End, append, attempted, line_of, read

HELP = """Whether a job is queued again, by why its run ended. The journal in the run folder says that; STATUS, the exit
status of srun, is used if it does not.
  preempted                                     yes, by the run itself (`training.preemption`)
  node lost                                     yes, by SLURM (`--requeue`)
  hang, crash                                   yes, but not after two failures at the same step of the run, nor after
                                                three starts in a row that kept no step
  not finite, configuration, out of memory      no: another start would end alike
Never with run.requeue=false. Only the starts of the same job count: who submits a job again has looked at it."""

NEVER = (Cause.non_finite, Cause.configuration, Cause.out_of_memory)
FAILURES = (Cause.hang, Cause.crash)
MOST_STARTS = 3
"""So many starts in a row that kept no step are the last ones."""


@dataclass(frozen=True)
class Job:
    """One start of a SLURM job, whose ranks have ended."""

    name: str
    restarts: int
    status: int
    """Exit status of srun: the highest of all ranks, those that it killed included."""


@dataclass(frozen=True)
class Decision:
    """Whether to queue a job again, and why."""

    again: bool
    cause: Cause
    reason: str
    """One line."""


def decide(attempts: Sequence[Attempt], job: Job, wanted: bool) -> Decision:
    """Whether to queue a failed job again.

    Args:
        attempts: all starts of the run, oldest first.
        job: the job and the exit status of its ranks.
        wanted: `run.requeue`.
    """
    own = [attempt for attempt in attempts if attempt.start.job == job.name]
    this = own[-1] if own and own[-1].start.restarts == job.restarts else None
    end = this.end if this else None
    cause = end.cause if end else _cause_by(job.status)
    against = _against(own, this, cause, job) or ("" if wanted else "run.requeue=false")
    then = f"not queued again: {against}" if against else "queued again"
    return Decision(not against, cause, f"{_described(this, end, cause, job)}: {then}")


def _cause_by(status: int) -> Cause:
    """The cause that an exit status alone shows."""
    shown = {STATUSES[cause]: cause for cause in (*NEVER, Cause.hang)}
    return shown.get(status, Cause.crash)


def _against(own: list[Attempt], this: Attempt | None, cause: Cause, job: Job) -> str:
    """The reason not to queue the job again; empty if there is no such reason."""
    if cause in NEVER:
        return "fix that, and submit the job again"
    if cause is Cause.done:
        return "the run is done"
    if job.status == LOST:
        return "another process writes to the run folder"
    if cause is Cause.preempted:
        return ""
    if not own:
        return "the job has never come to training"
    if this is not None and (twice := _same_step(own)):
        return twice
    starts = job.restarts - own[-1].start.restarts + _without_kept_step(own)
    return f"{starts} starts in a row kept no step" if starts >= MOST_STARTS else ""


def _same_step(own: list[Attempt]) -> str:
    """The reason if the last two failures were at the same step. A start-up has no step: it counts as a start."""
    failed = [attempt for attempt in own if attempt.end is None or attempt.end.cause is not Cause.preempted][-2:]
    if len(failed) < 2 or any(attempt.first is None or attempt.end is None for attempt in failed):
        return ""
    before, now = (attempt.end.step for attempt in failed if attempt.end)
    return f"the start before failed at step {now} too" if before == now else ""


def _without_kept_step(own: list[Attempt]) -> int:
    """How many of the last starts failed, none of which kept a step."""
    count = 0
    for attempt in reversed(own):
        if attempt.kept > attempt.start.step:
            break
        count += attempt.end is None or attempt.end.cause in FAILURES
    return count


def _described(this: Attempt | None, end: End | None, cause: Cause, job: Job) -> str:
    name = cause.value.replace("_", " ")
    if this is None:
        return f"{name if cause in NEVER else 'ended'} before training began (exit status {job.status})"
    if end is None:
        return f"{name} after step {this.step} (exit status {job.status}, no rank recorded why)"
    return f"{name} after step {end.step} ({end.why})" if end.why else f"{name} after step {end.step}"


def record_end(folder: Path, job: Job, cause: Cause) -> None:
    """Record the end of the job's last start, if none of its ranks did."""
    attempts = read(folder)
    if not attempts or attempts[-1].end is not None:
        return
    this = attempts[-1]
    if (this.start.job, this.start.restarts) == (job.name, job.restarts):
        validation = max((mark.validation for mark in this.marks), default=0.0)
        saving = max((mark.saving for mark in this.marks), default=0.0)
        spent = time.time(), this.step, validation, saving
        end = End(*spent, cause, job.status, rank=None, job=job.name, restarts=job.restarts)
        attempted(lambda: append(folder / JOURNAL, line_of("end", end)), folder / JOURNAL)
