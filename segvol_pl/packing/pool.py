"""Worker processes: one job in hand each, and a killed worker costs one job, not the run.

1. `run_jobs` does all jobs, in this process or in several, and shows the progress.
2. Each worker is a process pool of its own, with one process: a larger pool ends entirely when one of its processes
   is killed, and does not say over which job.
3. A job whose worker was killed is tried again at the end, alone. If that kills its worker too, it has no outcome.
4. Log records travel back with the outcome: only the parent process knows where they should go.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from segvol_pl.errors import PackError, listed

log = logging.getLogger(__name__)

KILLS_PER_WORKER = 3
"""Workers killed per configured one, without a single job finished, after which the run gives up."""

J = TypeVar("J")
R = TypeVar("R", covariant=True)


@dataclass(frozen=True)
class Work(Generic[J, R]):
    """What is done with a job, and how messages call it. Its functions must be importable: workers receive them."""

    do: Callable[[J], R]
    name: Callable[[J], str]
    """Names a job in messages."""
    doing: str = "packing"
    job: str = "case"
    unit: str = "volumes"
    prepare: Callable[[], None] | None = None
    """Called once in each worker process."""


def run_jobs(work: Work[J, R], jobs: Sequence[J], workers: int, console: Console) -> Iterator[tuple[J, R | None]]:
    """Do all jobs, in any order.

    Args:
        work: What is done with each.
        jobs: The jobs.
        workers: Processes; 0 for one per core. With one, the jobs are done in this process.
        console: Shows the progress.

    Returns:
        Each job as it ends, with its outcome: None if it killed two workers.

    Raises:
        PackError: Workers are killed and none finishes a job. What `work.do` raises is raised here too.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(work.unit))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(work.doing, total=len(jobs))
        here = ((job, work.do(job)) for job in jobs)
        for done in here if workers == 1 else _run_in_processes(work, jobs, workers):
            yield done
            progress.advance(task)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} {self.unit}/s" if speed else f"- {self.unit}/s")


# In the parent


def _run_in_processes(work: Work[J, R], jobs: Sequence[J], workers: int) -> Iterator[tuple[J, R | None]]:
    killed: list[J] = []
    for done, (job, outcome) in enumerate(_share_out(work, jobs, workers)):
        if outcome is not None:
            yield job, outcome
            continue
        killed.append(job)
        log.warning("a worker was killed over %s %s: it is tried again, alone", work.job, work.name(job))
        if len(killed) == done + 1 == KILLS_PER_WORKER * workers:
            raise PackError(
                f"{len(killed)} workers were killed and none finished a {work.job}; they were working on "
                f"{listed([work.name(each) for each in killed])}: memory is likely too small, use fewer workers="
            )
    # Alone: if the worker is killed now, its own job is the cause, not the others.
    yield from _share_out(work, killed, 1)


def _share_out(work: Work[J, R], jobs: Sequence[J], workers: int) -> Iterator[tuple[J, R | None]]:
    """Yield each job as it ends, and its outcome: None if its worker was killed."""
    waiting, staff = iter(jobs), [_Worker(work) for _ in range(workers)]
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


def _outcome_of(future: Future[tuple[R, list[logging.LogRecord]]]) -> R | None:
    try:
        outcome, records = future.result()
    except BrokenProcessPool:
        return None
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    return outcome


class _Worker(Generic[J, R]):
    """A process with one job in hand."""

    def __init__(self, work: Work[J, R]) -> None:
        self._work = work
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # One server process imports what all workers need. It has no threads, so it can be forked safely.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, self._work.do.__module__, "SimpleITK"])
        return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_worker, initargs=(self._work.prepare,))

    def take(self, job: J) -> Future[tuple[R, list[logging.LogRecord]]]:
        try:
            return self._pool.submit(_do_and_collect, self._work.do, job)
        except BrokenProcessPool:  # killed over an earlier job, or while it waited for one
            self._pool = self._start()
            return self._pool.submit(_do_and_collect, self._work.do, job)

    def dismiss(self) -> None:
        """Wait for the job in hand."""
        self._pool.shutdown(cancel_futures=True)


# In a worker


def _prepare_worker(prepare: Callable[[], None] | None) -> None:
    # Ctrl-C reaches the entire process group: the parent cancels what waits, and the jobs in hand are done first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
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


def _do_and_collect(do: Callable[[J], R], job: J) -> tuple[R, list[logging.LogRecord]]:
    collector, logger = _Collector(), logging.getLogger("segvol_pl")
    logger.addHandler(collector)
    try:
        return do(job), collector.records
    finally:
        logger.removeHandler(collector)
