"""The SLURM job that this process belongs to: how long it waited in the queue, and how it is queued again."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from datetime import datetime

log = logging.getLogger(__name__)

ANSWER = 20.0
"""Seconds within which slurmctld must answer."""


def job_name() -> str:
    """The job's id, ARRAY_TASK for a task of an array job, and empty outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def restarts() -> int:
    """How often SLURM has started the job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def record() -> dict[str, str]:
    """What `scontrol show job` says of the job; empty outside of SLURM, without `scontrol`, and without an answer."""
    shown = _scontrol("show", "job", "--oneliner", job_name())
    return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout)) if shown else {}


def queue_times() -> tuple[float, float] | None:
    """When this start of a batch job began to wait and when it got its nodes (s since the epoch); None if unknown."""
    shown = record()
    if shown.get("BatchFlag") != "1":
        return None  # what an interactive allocation waited for is not one run
    try:
        waiting, started = (datetime.fromisoformat(shown[key]).timestamp() for key in ("EligibleTime", "StartTime"))
    except (KeyError, ValueError):  # `Unknown`
        return None
    return waiting, started


def may_be_queued_again() -> bool:
    """Whether this start of the job still runs: one that is being cancelled, or queued already, is left alone."""
    shown = record()
    if shown.get("JobState") == "RUNNING" and shown.get("Restarts") == str(restarts()):
        return True
    if shown:
        log.info("job %s is not RUNNING any more: not requeued", job_name())
    return False


def queue_again() -> bool:
    """Requeue the job if it may be; return whether that worked. SLURM then ends this start within seconds."""
    if not may_be_queued_again():
        return False
    done = _scontrol("requeue", job_name())
    if done is None or done.returncode:
        why = done.stderr.strip() if done else "no answer"
        log.warning("scontrol requeue %s failed (%s): submit the job again", job_name(), why)
        return False
    return True


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    if not job_name() or shutil.which("scontrol") is None:
        return None
    try:
        command = ["scontrol", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER)
    except subprocess.TimeoutExpired:
        return None
