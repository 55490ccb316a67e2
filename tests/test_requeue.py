"""Which failed job is queued again: a table over what its journal holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from segvol_pl import journal, requeue
from segvol_pl.__main__ import main
from segvol_pl.errors import LOST, Cause
from segvol_pl.journal import Attempt, End, Journal, Mark, Saved, Start
from segvol_pl.requeue import Job

ROOT = Path(__file__).parents[1]
JOB = "7"


def start(
    cause: Cause | None, step: int, resumed: int = 0, saved: int = 0, job: str = JOB, why: str = "why"
) -> Attempt:
    """A start that ended for `cause` after `step`. None: it left no record. step < 0: in its start-up."""
    made = Attempt(Start(0.0, 0.0, resumed, 100, job=job))
    if step >= 0:
        made.first = Mark(1.0, resumed + 1)
        made.progress.append(Mark(2.0, step))
    if saved:
        made.saved.append(Saved(3.0, saved, file="last.ckpt", taken=3.0))
    if cause:
        made.ends.append(End(4.0, max(step, resumed), cause=cause, why="why"))
    return made


def numbered(attempts: list[Attempt]) -> list[Attempt]:
    """As SLURM counts the starts of a job."""
    for restarts, attempt in enumerate(each for each in attempts if each.start.job == JOB):
        attempt.start = Start(**{**vars(attempt.start), "restarts": restarts})
    return attempts


PREEMPTED, CRASH, HANG = Cause.preempted, Cause.crash, Cause.hang
TABLE = {
    "pre-empted": ([start(PREEMPTED, 9, saved=9)], 143, True, "preempted after step 9 (why): queued again"),
    "pre-empted often in its start-up": ([start(PREEMPTED, -1)] * 5, 138, True, ": queued again"),
    "hang": ([start(HANG, 9)], 137, True, "hang after step 9 (why): queued again"),
    "hang at the same step": (
        [start(HANG, 9, saved=5), start(HANG, 9, resumed=5)],
        137,
        False,
        "hang after step 9 (why): not queued again: the start before failed at step 9 too",
    ),
    "crash where it hung": ([start(HANG, 9, saved=5), start(CRASH, 9, 5)], 1, False, "failed at step 9 too"),
    "hang at another step": ([start(HANG, 9, saved=5), start(HANG, 12, 5, saved=10)], 70, True, ": queued again"),
    "same step, pre-empted between": (
        [start(HANG, 9, saved=5), start(PREEMPTED, 7, 5, saved=7), start(HANG, 9, 7)],
        70,
        False,
        "failed at step 9 too",
    ),
    "same step of another job": ([start(HANG, 9, saved=5, job="6"), start(HANG, 9, 5)], 70, True, ": queued again"),
    "two in the start-up": ([start(CRASH, -1)] * 2, 1, True, "crash after step 0 (why): queued again"),
    "three in the start-up": ([start(CRASH, -1)] * 3, 1, False, "3 starts in a row kept no step"),
    "three without a kept step": ([start(c, s) for c, s in ((CRASH, 3), (HANG, 4), (CRASH, 2))], 1, False, "3 starts"),
    "a lost node among them": ([start(CRASH, 3), start(None, 4), start(CRASH, 2)], 1, False, "3 starts in a row"),
    "a kept step among them": (
        [start(CRASH, 3), start(CRASH, 4, saved=2), start(CRASH, 3, 2)],
        1,
        True,
        "queued again",
    ),
    "not finite": (
        [start(Cause.non_finite, 9)],
        65,
        False,
        "non finite after step 9 (why): not queued again: fix that",
    ),
    "not finite, others killed": ([start(Cause.non_finite, 9)], 137, False, "not queued again: fix that"),
    "configuration": ([start(Cause.configuration, 0)], 1, False, "not queued again: fix that"),
    "out of memory": ([start(Cause.out_of_memory, 3)], 137, False, "out of memory after step 3 (why): not queued"),
    "done": ([start(Cause.done, 100)], 1, False, "the run is done"),
    "killed": ([start(None, 9)], 137, True, "crash after step 9 (exit status 137, no rank recorded why): queued again"),
    "hang without a record": ([start(None, 9)], 70, True, "hang after step 9 (exit status 70"),
    "out of memory without a record": ([start(None, 9)], 71, False, "fix that"),
    "taken over": ([start(None, 9)], LOST, False, "another process writes to the run folder"),
    "never begun": ([], 1, False, "ended before training began (exit status 1): not queued again: the job has never"),
    "configuration, never begun": ([], 2, False, "configuration before training began (exit status 2): not queued"),
    "another job's run": ([start(None, 9, job="6")], 1, False, "the job has never come to training"),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_policy(case: str) -> None:
    attempts, status, again, said = TABLE[case]
    attempts = numbered([Attempt(**vars(attempt)) for attempt in attempts])
    restarts = max((each.start.restarts for each in attempts if each.start.job == JOB), default=0)
    decided = requeue.decide(attempts, Job(JOB, restarts, status), wanted=True)
    assert decided.again is again and said in decided.reason
    unwanted = requeue.decide(attempts, Job(JOB, restarts, status), wanted=False)
    assert not unwanted.again and ("run.requeue=false" in unwanted.reason) is again


@pytest.mark.parametrize(("restarts", "again"), [(1, True), (2, True), (3, False)])
def test_starts_that_end_before_they_are_recorded_count(restarts: int, again: bool) -> None:
    """A start that kept a step, and then some that could not even be recorded, as with a broken disk."""
    kept = start(HANG, 9, saved=5)
    decided = requeue.decide([kept], Job(JOB, restarts, 1), wanted=True)
    assert decided.again is again
    assert decided.reason.startswith("ended before training began (exit status 1)")


def test_the_end_of_a_start_whose_ranks_left_none_is_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr("segvol_pl.slurm_job.record", dict)
    written = Journal(tmp_path, rank=0)
    written.start(0, 100, resume=True)
    written.mark("first", Mark(10.0, 1, 3.0))
    requeue.record_end(tmp_path, Job("8", 0, 137), Cause.crash)
    assert journal.read(tmp_path)[0].end is None, "not the job's run"
    for cause in (Cause.crash, Cause.hang):
        requeue.record_end(tmp_path, Job(JOB, 0, 137), cause)
    (attempt,) = journal.read(tmp_path)
    assert [(end.cause, end.status, end.rank, end.step, end.validation) for end in attempt.ends] == [
        (Cause.crash, 137, None, 1, 3.0)
    ]


# ---- the command ----

SCONTROL = """#!/bin/sh
echo "$@" >> {calls}
[ "$1" = requeue ] && exit {requeued}
echo "JobId=7 JobState={state} Restarts=1 BatchFlag=1 EligibleTime=2026-01-02T03:04:05 StartTime=2026-01-02T03:05:05"
"""


@pytest.mark.parametrize(
    ("state", "requeued", "said", "asked"),
    [
        ("RUNNING", 0, "hang after step 9 (why): queued again\n", True),
        ("RUNNING", 1, "hang after step 9 (why): queued again\n", True),
        ("CANCELLED", 0, "hang: job 7 is not running any more, and is left as it is\n", False),
    ],
)
def test_the_command_queues_a_running_job_again_and_leaves_others_alone(
    state: str,
    requeued: int,
    said: str,
    asked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls, tool = tmp_path / "calls", tmp_path / "scontrol"
    tool.write_text(SCONTROL.format(calls=calls, state=state, requeued=requeued))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    written = Journal(tmp_path / "run", rank=0)
    written.folder.mkdir()
    written.start(0, 100, resume=True)
    written.mark("first", Mark(10.0, 1))
    written.end(HANG, Mark(20.0, 9), "why", stalled=3.0)
    (attempt,) = journal.read(tmp_path / "run")
    assert attempt.start.queued_since is not None and attempt.start.job_started == attempt.start.queued_since + 60
    given = [str(ROOT / "configs/tiny/train.yaml"), "data.shards=x", "optim.max_steps=9", f"run.out={tmp_path / 'run'}"]
    assert main(["requeue", "137", "train", *given]) == 0
    assert capsys.readouterr().out == said
    assert ("requeue 7" in calls.read_text().splitlines()) is asked


def test_the_command_does_not_queue_a_wrong_configuration_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["requeue", "2", "train", "optim.max_step=9"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("configuration (unknown key optim.max_step") and ": not queued again: " in line
