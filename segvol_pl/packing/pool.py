"""Worker processes that stage cases: one case in hand each, and a killed worker costs one case, not the run.

1. `run_jobs` stages all jobs, in this process or in several, and shows the progress.
2. Each worker is a process pool of its own, with one process: a larger pool ends entirely when one of its processes
   is killed, and does not say over which case.
3. A case whose worker was killed is tried again at the end, alone. If that kills its worker too, it is a `BadCase`.
4. Log records travel back with the outcome: only the parent process knows where they should go.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from segvol_pl.errors import PackError, listed
from segvol_pl.imaging.itk import sitk
from segvol_pl.packing.stage import BadCase, Job, Staged, stage

log = logging.getLogger(__name__)

KILLS_PER_WORKER = 3
"""Workers killed per configured one, without a single case finished, after which packing gives up."""


def run_jobs(jobs: list[Job], workers: int, console: Console) -> dict[str, Staged | BadCase]:
    """Stage all jobs and return what became of them, by key.

    Args:
        jobs: The cases.
        workers: Processes; 0 for one per core. With one, the cases are staged in this process.
        console: Shows the progress.

    Raises:
        PackError: The staging folder cannot be written, or workers are killed and none finishes a case.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    outcomes: dict[str, Staged | BadCase] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("packing", total=len(jobs))
        here = ((job.key, stage(job)) for job in jobs)
        for key, outcome in here if workers == 1 else _run_in_processes(jobs, workers):
            outcomes[key] = outcome
            progress.advance(task)
    return outcomes


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} volumes/s" if speed else "- volumes/s")


# In the parent


def _run_in_processes(jobs: list[Job], workers: int) -> Iterator[tuple[str, Staged | BadCase]]:
    killed: list[Job] = []
    for done, (job, outcome) in enumerate(_share_out(jobs, workers)):
        if outcome:
            yield job.key, outcome
            continue
        killed.append(job)
        log.warning("a worker was killed over case %s (%s): it is tried again, alone", job.case.id, job.case.image)
        if len(killed) == done + 1 == KILLS_PER_WORKER * workers:
            raise PackError(
                f"{len(killed)} workers were killed and none finished a case; they were working on "
                f"{listed([job.case.id for job in killed])}: memory is likely too small, use fewer workers="
            )
    # Alone: if the worker is killed now, its own case is the cause, not the others.
    for job, outcome in _share_out(killed, 1):
        yield (
            job.key,
            outcome
            or BadCase(
                job.case.id,
                str(job.case.image),
                f"{job.case.image}: its worker was killed twice, the second time with no other one running; memory is "
                "likely too small: leave the case out or use more memory",
            ),
        )


def _share_out(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Staged | BadCase | None]]:
    """Yield each job as it ends, and what became of it: None if its worker was killed."""
    waiting, staff = iter(jobs), [_Worker() for _ in range(workers)]
    try:
        in_hand = {worker.take(job): (job, worker) for worker, job in zip(staff, waiting, strict=False)}
        while in_hand:
            for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                job, worker = in_hand.pop(future)
                outcome = _outcome_of(future)
                if following := next(waiting, None):
                    in_hand[worker.take(following)] = following, worker
                yield job, outcome
    finally:
        for worker in staff:
            worker.dismiss()


def _outcome_of(future: Future[tuple[Staged | BadCase, list[logging.LogRecord]]]) -> Staged | BadCase | None:
    try:
        outcome, records = future.result()
    except BrokenProcessPool:
        return None
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    return outcome


class _Worker:
    """A process with one case in hand."""

    def __init__(self) -> None:
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # One server process imports what all workers need. It has no threads, so it can be forked safely.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "SimpleITK"])
        return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_worker)

    def take(self, job: Job) -> Future[tuple[Staged | BadCase, list[logging.LogRecord]]]:
        try:
            return self._pool.submit(_stage_and_collect, job)
        except BrokenProcessPool:  # killed over an earlier case, or while it waited for one
            self._pool = self._start()
            return self._pool.submit(_stage_and_collect, job)

    def dismiss(self) -> None:
        """Wait for the case in hand."""
        self._pool.shutdown(cancel_futures=True)


# In a worker


def _prepare_worker() -> None:
    # Ctrl-C reaches the entire process group: the parent cancels what waits, and the cases in hand are staged first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    logger = logging.getLogger("segvol_pl")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def _end_with_parent() -> None:
    """End this process when its parent is gone. A killed parent cannot end its workers, which would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _stage_and_collect(job: Job) -> tuple[Staged | BadCase, list[logging.LogRecord]]:
    collector, logger = _Collector(), logging.getLogger("segvol_pl")
    logger.addHandler(collector)
    try:
        return stage(job), collector.records
    finally:
        logger.removeHandler(collector)
