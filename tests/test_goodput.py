"""The journal of a run, and the arithmetic of goodput over it: where the wall time went, to the second."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segvol_pl import goodput, journal
from segvol_pl.errors import (
    OUT_OF_MEMORY,
    SIGNALLED,
    Cause,
    ConfigError,
    NonFiniteError,
    ShardError,
    StoreError,
    cause_of,
    status_of,
)
from segvol_pl.goodput import Parts, Tally
from segvol_pl.journal import Attempt, End, Journal, Mark, Saved, Start


def attempt(began: float, first: Mark | None, *more: Mark, step: int = 0, **place: object) -> Attempt:
    """A start at `began` that resumed from `step`; more: its progress, saves and ends."""
    made = Attempt(Start(began + 1, began, step, 100, **place), first)  # type: ignore[arg-type]
    for mark in more:
        kind = made.ends if isinstance(mark, End) else made.saved if isinstance(mark, Saved) else made.progress
        kind.append(mark)  # type: ignore[arg-type]
    return made


def saved(at: float, step: int, validation: float = 0.0, saving: float = 0.0) -> Saved:
    """A checkpoint whose content was taken at `at`, on the disk 3 s later."""
    return Saved(at + 3, step, validation, saving, "last.ckpt", at)


# ---- the arithmetic ----


def test_the_parts_of_a_run_with_three_interruptions() -> None:
    """A crash, a hang and a kill without record; then it is done. By hand, in seconds."""
    crashed = attempt(
        *(1000, Mark(1030, 1, 5)),
        saved(1080, 10, 5, 2),
        End(1100, 13, 5, 2, cause=Cause.crash),
    )
    hung = attempt(
        *(1160, Mark(1180, 11)),
        saved(1210, 20, 0, 1),
        saved(1250, 30, 4, 2),
        End(1350, 33, 4, 2, cause=Cause.hang, stalled=80),
        step=10,
    )
    killed = attempt(*(1400, Mark(1410, 31)), saved(1430, 35), Mark(1440, 37), step=30)
    done = attempt(*(1500, Mark(1520, 36)), Mark(1600, 90, 10), End(1615, 100, 10, 5, cause=Cause.done), step=35)
    spent = [each for each, _ in goodput.each([crashed, hung, killed, done], running=False)]
    # start-up 25 without the validation in it; 10 steps in 80 - 30 - 2 after the first; then 20 s of lost steps
    assert spent[0] == Parts(kept=48, start_up=25, validation=5, saving=2, lost=20)
    assert spent[1] == Parts(kept=64, queue=60, start_up=20, validation=4, saving=2, lost=20, hang=80)
    assert spent[2] == Parts(kept=20, queue=50, start_up=10, lost=10)
    assert spent[3] == Parts(kept=80, queue=60, start_up=20, validation=10, saving=5)
    total = goodput.parts([crashed, hung, killed, done], running=False)
    assert total.wall == 1615 - 1000 and total.kept == 212
    assert sum(total.shares().values()) == pytest.approx(1)


def test_a_lost_node_costs_until_slurm_queues_the_job_again() -> None:
    lost = attempt(0, Mark(10, 1), Mark(60, 50), job="7")
    again = attempt(200, Mark(210, 1), job="7", restarts=1, queued_since=90.0, job_started=190.0)
    spent = [each for each, _ in goodput.each([lost, again], running=True)]
    assert spent[1] == Parts(lost=30, queue=110, start_up=10)
    by_hand = replace(again, start=replace(again.start, job="8"))
    assert goodput.each([lost, by_hand], running=True)[1][0] == Parts(queue=140, start_up=10)
    assert goodput.interruptions([lost, again]) == "node lost 1"
    assert goodput.interruptions([lost, by_hand, by_hand]) == "crash 2"


def test_the_queue_before_the_first_start_counts_and_not_the_script_before_it() -> None:
    start = attempt(1000, None, queued_since=100.0, job_started=400.0)
    assert goodput.parts([start], running=True) == Parts(queue=300, start_up=1)


def test_steps_between_two_records_are_kept_in_proportion() -> None:
    """A start that resumed from a checkpoint whose record is missing, as after a kill just then."""
    first = attempt(0, Mark(10, 1), Mark(110, 101))
    for resumed, kept in ((0, 0), (1, 0), (51, 50), (101, 100), (500, 100)):
        later = attempt(200, None, step=resumed)
        assert goodput.each([first, later], running=True)[0][0].kept == kept


def test_a_run_that_starts_over_has_kept_nothing() -> None:
    """Also not the steps that a start in between had resumed from."""
    starts = [attempt(0, Mark(10, 1), saved(50, 20)), attempt(100, Mark(110, 21), step=20), attempt(200, Mark(210, 1))]
    assert [each.kept for each, _ in goodput.each(starts, running=False)] == [0, 0, 0]


times = st.floats(0, 1e4)
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def attempts(draw: st.DrawFn) -> list[Attempt]:
    """Starts whose clocks jump, whose records are incomplete, and whose counts exceed the time that there was."""
    found = []
    for restarts in range(draw(st.integers(1, 5))):
        begun, step = draw(times), draw(st.integers(0, 40))
        marks = draw(
            st.lists(
                st.one_of(
                    st.builds(Mark, times, st.integers(0, 60), times, times),
                    st.builds(Saved, times, st.integers(0, 60), times, times, st.just("last.ckpt"), times),
                    st.builds(End, times, st.integers(0, 60), times, times, st.sampled_from(Cause), stalled=times),
                ),
                max_size=5,
            )
        )
        first = draw(st.none() | st.builds(Mark, times, st.integers(0, 60), times, times))
        queued = draw(st.none() | times)
        place = {"job": "7", "restarts": restarts, "queued_since": queued, "job_started": queued}
        found.append(attempt(begun, first, *marks, step=step, **place))
    return found


@untimed
@given(attempts(), st.booleans())
def test_the_parts_add_up_whatever_the_journal_holds(starts: list[Attempt], running: bool) -> None:
    total = goodput.parts(starts, running)
    ended = starts[0].start.began
    for each in starts:
        ended = max(ended, each.start.began, each.ended_at)
    assert min(astuple(total)) >= 0
    assert total.wall == pytest.approx(ended - starts[0].start.began, abs=1e-6)


@untimed
@given(attempts())
def test_a_running_run_counts_its_earlier_starts_once(starts: list[Attempt]) -> None:
    now = Mark(2e4, 70)
    *earlier, last = starts
    ongoing = replace(last, ends=[], progress=[*last.progress, now])
    expected = goodput.parts([*earlier, ongoing], running=True)
    assert astuple(Tally([*earlier, replace(last, ends=[])]).parts(now)) == pytest.approx(astuple(expected), abs=1e-6)


# ---- the journal ----


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def test_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Journal(tmp_path, rank=0)
    written.start(0, 100, resume=True)
    written.mark("first", Mark(10.0, 1))
    written.mark("progress", Mark(20.0, 5, 1.5, 0.5))
    written.mark("saved", saved(20.0, 5))
    written.end(Cause.hang, Mark(60.0, 6), "rank 1\nstands", stalled=30.0)
    written.end(Cause.crash, Mark(61.0, 6), "what followed from it")
    (read,) = journal.read(tmp_path)
    assert read.first == Mark(10.0, 1) and read.progress == [Mark(20.0, 5, 1.5, 0.5)]
    assert read.saved == [saved(20.0, 5)] and (read.step, read.kept, read.ended_at) == (6, 5, 60.0)
    assert read.end is not None and (read.end.cause, read.end.status) == (Cause.hang, 70)
    assert (read.end.why, read.end.stalled) == ("rank 1 stands", 30.0)


def test_a_line_that_a_kill_cut_costs_only_itself(tmp_path: Path) -> None:
    first = Journal(tmp_path, rank=0)
    first.start(0, 100, resume=True)
    first.mark("first", Mark(10.0, 1))
    path = tmp_path / journal.JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert journal.read(tmp_path)[0].first is None
    Journal(tmp_path, rank=0).start(1, 100, resume=True)
    assert [each.start.step for each in journal.read(tmp_path)] == [0, 1]


def test_a_full_disk_ends_no_run_and_its_lines_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = os.write
    written = Journal(tmp_path, rank=0)
    written.start(0, 100, resume=True)
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, lines: writes(descriptor, lines[:20]))
        written.mark("first", Mark(10.0, 1))
    assert len((tmp_path / journal.JOURNAL).read_text().splitlines()) == 1
    written.mark("progress", Mark(20.0, 5))
    (read,) = journal.read(tmp_path)
    assert read.first == Mark(10.0, 1) and read.progress == [Mark(20.0, 5)]


def test_the_rank_that_explains_the_end_gives_the_cause(tmp_path: Path) -> None:
    """Rank 0 lost its connection to rank 3, which ran out of memory, and so did others."""
    ranks = [Journal(tmp_path, rank) for rank in range(4)]
    ranks[0].start(0, 100, resume=True)
    begun = journal.read(tmp_path)[0].start.at
    for rank, cause in ((1, Cause.crash), (3, Cause.out_of_memory), (0, Cause.crash)):
        ranks[rank].end(cause, Mark(begun + rank, 7 - rank), f"rank {rank}")
    ranks[2].end(Cause.preempted, Mark(begun, 7))
    (read,) = journal.read(tmp_path)
    assert read.end is not None and len(read.ends) == 3
    assert (read.end.cause, read.end.status, read.end.rank) == (Cause.out_of_memory, OUT_OF_MEMORY, 3)


def test_the_end_of_another_rank_belongs_to_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restarts in (0, 1):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        monkeypatch.setattr("segvol_pl.slurm_job.record", dict)
        Journal(tmp_path, rank=0).start(0, 100, resume=True)
        if not restarts:
            Journal(tmp_path, rank=2).end(Cause.crash, Mark(journal.read(tmp_path)[0].start.at + 1e6, 3))
    first, second = journal.read(tmp_path)
    assert first.end is not None and first.end.rank == 2 and second.end is None


def test_a_new_run_in_the_folder_begins_a_new_journal(tmp_path: Path) -> None:
    for resume in (True, False, False):
        Journal(tmp_path, rank=0).start(0, 100, resume)
    assert len(journal.read(tmp_path)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        journal.JOURNAL,
        "journal-earlier-1.jsonl",
        "journal-earlier-2.jsonl",
    }


@pytest.mark.parametrize(
    ("error", "cause", "status"),
    [
        (NonFiniteError("x"), Cause.non_finite, 65),
        (ConfigError("x"), Cause.configuration, 2),
        (ShardError("x"), Cause.configuration, 1),
        (StoreError("x"), Cause.crash, 1),
        (MemoryError(), Cause.out_of_memory, 71),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Cause.out_of_memory, 71),
        (OSError("x"), Cause.crash, 1),
        (RuntimeError("x"), Cause.crash, 1),
        (SystemExit(SIGNALLED + signal.SIGTERM), Cause.preempted, 143),
        (SystemExit(1), Cause.crash, 1),
        (KeyboardInterrupt(), Cause.preempted, 130),
    ],
)
def test_an_error_has_a_cause_and_a_status(error: BaseException, cause: Cause, status: int) -> None:
    assert (cause_of(error), status_of(error)) == (cause, status)


# ---- the listing ----


def test_a_folder_of_runs_is_listed(tmp_path: Path) -> None:
    for name, cause in (("a", Cause.done), ("b/c", Cause.hang), ("d", None)):
        (tmp_path / name).mkdir(parents=True)
        written = Journal(tmp_path / name, rank=0)
        written.start(0, 100, resume=True)
        if cause:
            written.end(cause, Mark(journal.read(tmp_path / name)[0].start.at, 7), "said why")
    rows = [goodput.describe(folder) for folder in goodput.run_folders([str(tmp_path), str(tmp_path / "a")])]
    assert [row["run"] for row in rows] == [str(tmp_path / name) for name in ("a", "b/c", "d")]
    assert [row["state"] for row in rows] == ["done", "failed: hang", "stopped"]
    assert [row["step"] for row in rows] == ["7/100", "7/100", "0/100"] and rows[1][""] == "said why"


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}: no {journal.JOURNAL} in it or below it"):
        goodput.run_folders([str(tmp_path)])
    with pytest.raises(ConfigError, match="no such folder"):
        goodput.run_folders([str(tmp_path / "gone")])


def test_lines_are_json_objects(tmp_path: Path) -> None:
    line = journal.line_of("saved", saved(1.23456, 5))
    assert json.loads(line) == {
        **{"event": "saved", "at": 4.235, "step": 5, "validation": 0.0, "saving": 0.0},
        **{"file": "last.ckpt", "taken": 1.235},
    }
