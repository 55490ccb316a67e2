"""Goodput: the share of a run's wall time that ended in kept steps, and where the rest went. Needs no torch.

The wall time of a run lasts from its first start, the time in the queue before it included, to its last record. It is
cut at the moments that the journal holds, so that the parts (`HELP`) add up to it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

from segvol_pl.errors import Cause, ConfigError
from segvol_pl.folder_lock import LOCK, seems_alive
from segvol_pl.journal import JOURNAL, Attempt, Mark, Saved, Start, read

HELP = """Parts of a run's wall time, over all its starts:
  queue         from the end of one start to the beginning of the next; before the first start only if SLURM says so
  start-up      from the beginning of a start to the end of its first step
  validation    all validations
  saving        for how long training waited for checkpoints, not for how long these were written in the background
  goodput       steps from which a later start, or the end of the run, continued
  lost          steps after the checkpoint that the next start resumed from, and what followed until the end
  hang          from the last progress to the end of a start in which a rank hung
The state is running, done, preempted, stopped (killed: no record of its end), or failed, with the cause. The data are
in journal.jsonl in the run folder."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a run's wall time, by what they were spent on."""

    kept: float = 0.0
    queue: float = 0.0
    start_up: float = 0.0
    validation: float = 0.0
    saving: float = 0.0
    lost: float = 0.0
    hang: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def wall(self) -> float:
        """Wall time, s."""
        return float(sum(astuple(self)))

    def shares(self) -> dict[str, float]:
        """Part -> share of the wall time; all 0 if no time has passed."""
        return {each.name: getattr(self, each.name) / self.wall if self.wall else 0.0 for each in fields(self)}


# ---- the arithmetic ----


def parts(attempts: Sequence[Attempt], running: bool) -> Parts:
    """Where the wall time of a run went. attempts: all its starts; running: whether the last one still runs."""
    return sum((spent for spent, _ in each(attempts, running)), Parts())


def each(attempts: Sequence[Attempt], running: bool) -> list[tuple[Parts, float]]:
    """Where the time of each start went, with the time in the queue before it, and when it ended."""
    found: list[tuple[Parts, float]] = []
    before: Attempt | None = None
    after = 0.0
    for attempt, until in zip(attempts, _kept_until(attempts, running), strict=True):
        spent, after = spent_by(attempt, before, after, until)
        found.append((spent, after))
        before = attempt
    return found


class Tally:
    """The parts of a run that is running. Those of its earlier starts are computed once."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        spent = each(attempts, running=True)
        self.attempt = attempts[-1]
        self.before = attempts[-2] if len(attempts) > 1 else None
        self.after = spent[-2][1] if len(attempts) > 1 else 0.0
        self.earlier = sum((each for each, _ in spent[:-1]), Parts())

    def parts(self, now: Mark) -> Parts:
        """The parts up to `now`, a mark of the start that is running."""
        seen = replace(self.attempt, progress=[*self.attempt.progress, now])
        return self.earlier + spent_by(seen, self.before, self.after, None)[0]


def _kept_until(attempts: Sequence[Attempt], running: bool) -> list[int | None]:
    """For each start the last step that was kept of it; None if all of them were."""
    found: list[int | None] = []
    resumed: int | None = None
    for attempt in reversed(attempts):
        if resumed is None:
            complete = running or (attempt.end is not None and attempt.end.cause is Cause.done)
            found.append(None if complete else attempt.kept)
        else:
            found.append(resumed)
        resumed = attempt.start.step if resumed is None else min(resumed, attempt.start.step)
    return found[::-1]


def spent_by(attempt: Attempt, before: Attempt | None, after: float, until: int | None) -> tuple[Parts, float]:
    """Where the time of one start went, and when it ended.

    Args:
        attempt: the start.
        before: the start before it; None for the first one.
        after: when that one ended (s since the epoch).
        until: the last step that was kept; None for all.
    """
    waited, begun = (
        (_first_wait(attempt.start), attempt.start.began) if before is None else _gap(attempt, before, after)
    )
    end, marks = attempt.end, attempt.marks
    ended = max(begun, attempt.ended_at)
    # Each part takes what it took at most from what is left: the parts cannot add up to more than the time.
    left = ended - begun
    hang = min(left, end.stalled) if end is not None and end.cause is Cause.hang else 0.0
    left -= hang
    validation = min(left, max((mark.validation for mark in marks), default=0.0))
    left -= validation
    saving = min(left, max((mark.saving for mark in marks), default=0.0))
    left -= saving
    first = attempt.first
    start_up = left if first is None else min(left, max(0.0, first.at - begun - first.validation - first.saving))
    left -= start_up
    kept = left if until is None else min(left, _seconds_until(attempt, until))
    return waited + Parts(kept, 0.0, start_up, validation, saving, left - kept, hang), ended


def _first_wait(start: Start) -> Parts:
    """The time in the queue before the first start of a run."""
    if start.queued_since is None or start.job_started is None:
        return Parts()
    return Parts(queue=max(0.0, start.job_started - start.queued_since))


def _gap(attempt: Attempt, before: Attempt, after: float) -> tuple[Parts, float]:
    """The time between two starts, and when the second one began, which clocks of two hosts may put before `after`."""
    start = attempt.start
    begun = max(after, start.began)
    unseen = 0.0
    if before.interrupted_by(attempt) is Cause.node_lost and start.queued_since is not None:
        # It ran or stood still until SLURM queued it again.
        unseen = min(max(0.0, start.queued_since - after), begun - after)
    return Parts(lost=unseen, queue=begun - after - unseen), begun


def _seconds_until(attempt: Attempt, step: int) -> float:
    """Seconds of training, without validation and saving, from the end of a start's first step to the end of `step`.

    Exact at a recorded step, linear between two of them, 0 up to the first step.
    """
    if attempt.first is None:
        return 0.0
    reached: dict[int, float] = {}
    for mark in attempt.marks:
        seconds = max(0.0, _training_seconds(mark, attempt.first))
        # The end repeats the last step, some time after it.
        reached[mark.step] = min(seconds, reached.get(mark.step, seconds))
    steps = sorted(reached)
    place = bisect_right(steps, step)
    if place == 0:
        return 0.0
    low = steps[place - 1]
    if place == len(steps) or low == step:
        return reached[low]
    high = steps[place]
    return reached[low] + (reached[high] - reached[low]) * (step - low) / (high - low)


def _training_seconds(mark: Mark, first: Mark) -> float:
    at = mark.taken if isinstance(mark, Saved) else mark.at
    return at - first.at - (mark.validation - first.validation) - (mark.saving - first.saving)


# ---- the listing ----


def run_folders(given: Sequence[str]) -> list[Path]:
    """The run folders among the given ones and below them. Raises ConfigError for a folder without any."""
    found: list[Path] = []
    for folder in map(Path, given):
        below = list(_below(folder))
        if not below:
            what = f"no {JOURNAL} in it or below it" if folder.is_dir() else "no such folder"
            raise ConfigError(f"{folder}: {what}: give a run folder (run.out), or a folder of those")
        found += below
    return list(dict.fromkeys(found))


def _below(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder):
        names.sort()
        if JOURNAL in files:
            names.clear()
            yield Path(place)


def state(folder: Path, attempts: Sequence[Attempt]) -> str:
    """Whether the run is running, done, preempted, stopped (no record of its end), or has failed, and of what."""
    end = attempts[-1].end
    if end is None:
        return "running" if seems_alive(folder / LOCK) else "stopped"
    return end.cause.value if end.cause in (Cause.done, Cause.preempted) else f"failed: {end.cause.value}"


def interruptions(attempts: Sequence[Attempt]) -> str:
    """How often each cause ended a start that another one followed: `hang 1, preempted 3`."""
    counts = Counter(before.interrupted_by(after) for before, after in pairwise(attempts))
    return ", ".join(f"{cause.value.replace('_', ' ')} {count}" for cause, count in sorted(counts.items()))


def describe(folder: Path) -> dict[str, str]:
    """One row of the table of `segvol-pl runs`. The folder must hold a journal with a start."""
    attempts = read(folder)
    if not attempts:
        raise ConfigError(f"{folder / JOURNAL}: holds no start of a run")
    now, last = state(folder, attempts), attempts[-1]
    spent = parts(attempts, now == "running")
    shares = {name.replace("_", "-"): f"{100 * share:.1f} %" for name, share in spent.shares().items()}
    return {
        "run": str(folder),
        "state": now,
        "step": f"{last.step}/{last.start.max_steps}",
        "starts": str(len(attempts)),
        "hours": f"{spent.wall / 3600:.2f}",
        "goodput": shares.pop("kept"),
        **shares,
        "interrupted by": interruptions(attempts),
        "": last.end.why if last.end else "",
    }


def metrics(spent: Parts) -> dict[str, float]:
    """`goodput/kept` and so on, shares of the wall time so far, and `goodput/hours`, the wall time."""
    return {f"goodput/{name}": share for name, share in spent.shares().items()} | {"goodput/hours": spent.wall / 3600}
