"""CT files into shards (verb `pack`).

1. `pack` finds the cases and hands them to worker processes, one case at a time.
2. Each case is read, cropped, measured and encoded by `measure.pack_case`.
3. Each packed case is staged as a tar of its own, named by a fingerprint of its files' names, sizes and times and of
   the configuration, so that an interrupted run goes on where it stopped and a changed file is packed anew. With
   `part=K/N` a run stages its part of the cases alone: many machines share the work.
4. The staged cases are joined into shards in the order of their keys; the index comes last, then staging goes.

Equal cases and configuration give byte-identical shards, however often the run was interrupted and whatever the
number of workers and slices. Cases that cannot be used are listed and left out, up to a bound.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from segvol_pl.atomic import NoRoomError, write_text
from segvol_pl.config import PackConfig, parse_part
from segvol_pl.config.categories import listed, load_categories
from segvol_pl.data.schema import Split
from segvol_pl.data.shards import (
    INDEX,
    SampleRecord,
    build_index,
    read_index,
    read_sample,
    walk_shard,
    write_shard,
)
from segvol_pl.data.store import Store
from segvol_pl.errors import PackError, SampleError, VolumeError
from segvol_pl.folder_lock import FolderLock
from segvol_pl.imaging.dicom import files_of
from segvol_pl.imaging.itk import simple_itk, sitk
from segvol_pl.imaging.read import source_sha256
from segvol_pl.packing.cases import Case, find_cases, read_cases
from segvol_pl.packing.m3d import is_m3d, m3d_cases
from segvol_pl.packing.prepare import Rules, pack_case
from segvol_pl.packing.recipes import DatasetRecipe, read_recipe, recipe_cases

log = logging.getLogger(__name__)

STAGING = ".staging"
REPORT = "pack_report.json"
SPLITS = "splits.csv"
PATIENCE = 3
"""Workers killed for each configured one, and not a case finished, before packing gives up."""
COPIES = 8
"""Shards joined side by side."""
KEY_LENGTH = 80
"""Characters of a key at most: a member's name must fit a tar header of 100."""
KEY_HASH = 8
"""Of them, those that tell apart ids with letters beyond ASCII."""


@dataclass(frozen=True)
class Job:
    """One case on its way to a worker."""

    case: Case
    key: str
    rules: Rules
    staging: Path
    fingerprint: str
    """Tells whether the case's files or the rules changed since it was staged."""

    @property
    def path(self) -> Path:
        """Where it is staged."""
        return self.staging / f"{self.key}.{self.fingerprint}.tar"


@dataclass(frozen=True)
class Staged:
    """A packed case, in a tar of its own in the staging folder."""

    id: str
    record: SampleRecord
    content_sha256: str
    fingerprint: str


@dataclass(frozen=True)
class BadCase:
    """A case that cannot be used, and why."""

    id: str
    file: str
    reason: str


@dataclass(frozen=True)
class PackReport:
    """What became of the cases; `pack_report.json`."""

    cases: int
    fingerprint: str
    bad: list[BadCase]
    duplicates: dict[str, str]
    """Case left out -> the case kept that holds the same voxels."""
    staged: dict[str, str] = field(default_factory=dict)
    """Key of each sample packed -> the fingerprint of its files and rules."""
    samples_per_shard: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    """Split -> samples packed. Empty where packing failed."""
    shards: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def packed(self) -> int:
        """Samples in the shards."""
        return sum(self.splits.values())


def pack(config: PackConfig, console: Console | None = None) -> PackReport:
    """Packs the configured cases into `config.out` and returns the report, also written there.

    A folder already packed from the same cases and configuration is left as it is; where cases were added or repaired
    since, they alone are packed, and the shards joined anew. Raises CaseError for cases or
    categories that cannot be found or paired, LockedError where another process packs into `out`, and PackError where
    it holds something else, no case can be used, or more of them cannot than `max_bad_fraction` allows; then no index
    is written.
    """
    console = console or Console(quiet=True)
    start, out = time.monotonic(), Path(config.out)
    recipe = read_recipe(config.recipe) if config.recipe else None
    rules, cases = _rules_of(config, recipe), _cases_of(config, recipe, console)
    fingerprint = rules.fingerprint(config.samples_per_shard, [_stat_of(case) for case in cases])
    if (out / INDEX).exists() and (finished := _finished(out)).fingerprint == fingerprint:
        return _left_as_it_is(finished, out, console)
    simple_itk()  # now, rather than in each case's worker
    with _lock(config):
        jobs = _open_jobs(config, cases, rules, console)
        if config.part:
            number, count = parse_part(config.part)
            return _stage_slice(jobs[number::count], config, fingerprint, console)
        outcomes = [outcome for _, outcome in sorted(_run(jobs, _workers(config, jobs), console).items())]
        kept, duplicates = _drop_duplicates([outcome for outcome in outcomes if isinstance(outcome, Staged)])
        bad = [outcome for outcome in outcomes if isinstance(outcome, BadCase)]
        report = PackReport(len(cases), fingerprint, bad, duplicates)
        _print_left_out(report, console)
        _check_bound(report, config, out, start)
        return _finish(kept, report, config, rules.dataset, start, console)


def _lock(config: PackConfig) -> FolderLock:
    """Slices stage side by side; what joins them, or packs alone, bears no other beside it."""
    if config.part:
        return FolderLock(Path(config.out), f".lock-{config.part.replace('/', '-of-')}.json", against=".lock.json")
    return FolderLock(Path(config.out), against=".lock-*.json")


def listed_jobs(config: PackConfig) -> list[Job]:
    """The cases that `pack` would take, with their keys, rules and landmarks, for whoever reads them without packing.

    Raises as `pack` does for cases and categories that cannot be found or paired.
    """
    recipe = read_recipe(config.recipe) if config.recipe else None
    cases = _cases_of(config, recipe, Console(quiet=True))
    return _jobs_of(cases, _rules_of(config, recipe), Path(config.out) / STAGING)


def _stage_slice(jobs: list[Job], config: PackConfig, fingerprint: str, console: Console) -> PackReport:
    """Stages the jobs and leaves the rest to the run that joins; what is bad is tried again by it."""
    if not jobs:
        console.print(f"part {config.part}: no case falls into it")
        return PackReport(0, fingerprint, [], {})
    outcomes = _run(jobs, _workers(config, jobs), console).values()
    bad = [outcome for outcome in outcomes if isinstance(outcome, BadCase)]
    report = PackReport(len(jobs), fingerprint, bad, {})
    _print_left_out(report, console)
    console.print(f"part {config.part}: {len(jobs) - len(bad)} of {len(jobs)} cases staged: run without part= to join")
    return report


def _rules_of(config: PackConfig, recipe: DatasetRecipe | None) -> Rules:
    d, h, w = config.overview_shape
    return Rules(
        dataset=config.dataset or (recipe.name if recipe else "unnamed"),
        modality=config.modality or (recipe.modality if recipe else "CT"),
        overview_shape=(d, h, w),
        anchors=config.anchors,
        test_fraction=config.test_fraction,
        regions=config.regions,
        categories=load_categories(config.categories) if config.categories else recipe.categories if recipe else {},
    )


def _cases_of(config: PackConfig, recipe: DatasetRecipe | None, console: Console) -> list[Case]:
    cases = _listed_cases(config, recipe)
    if recipe:
        found = len(cases)
        cases = [case for case in cases if not recipe.excludes(case.id)]
        console.print(f"{recipe.title}: {len(cases)} cases of the paper's {recipe.volumes}")
        if len(cases) < found:
            console.print(f"{found - len(cases)} cases are left out: {recipe.exclude_reason}")
        if not recipe.certain:
            log.warning("%s: not certain: %s", config.recipe, recipe.doubts)
    elif any(case.label and not case.channels for case in cases) and not config.categories:
        raise PackError("categories: the cases are labelled: give categories=FILE (YAML: name -> label values)")
    return cases


def _listed_cases(config: PackConfig, recipe: DatasetRecipe | None) -> list[Case]:
    if config.cases:
        return m3d_cases(config.cases, recipe) if is_m3d(config.cases) else read_cases(config.cases)
    return recipe_cases(recipe, str(config.images)) if recipe else find_cases(str(config.images), config.labels)


def _stat_of(case: Case) -> list[Any]:
    """What tells cheaply whether a case's files changed since they were packed."""
    stats = [stat for path in case.paths for stat in _file_stats(path)]
    return [case.id, sorted(case.masks), case.channels, case.notes, stats]


def _file_stats(path: Path) -> list[list[Any]]:
    """Name, size and time of the files; without those that cannot be looked at, of which packing will say so."""
    try:
        return [[file.name, *((s := file.stat()).st_size, s.st_mtime_ns)] for file in files_of(path) if file.exists()]
    except OSError:
        return []


def _finished(out: Path) -> PackReport:
    """The report of a folder that is already packed. Raises PackError where something else wrote it."""
    try:
        raw = json.loads((out / REPORT).read_text(encoding="utf-8"))
        bad = [BadCase(**case) for case in raw["bad"]]
        return PackReport(**{**raw, "bad": bad})
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise PackError(f"out: {out} holds an index that pack did not write: give another folder") from None


def _packed_otherwise(out: Path, how: str) -> PackError:
    return PackError(
        f"out: {out} is packed from other files or with another configuration ({how}): give another folder"
    )


def _left_as_it_is(report: PackReport, out: Path, console: Console) -> PackReport:
    shutil.rmtree(out / STAGING, ignore_errors=True)
    console.print(f"{out} is complete ({report.packed} samples): nothing to do")
    return report


def _reopen(out: Path, report: PackReport, jobs: list[Job], console: Console) -> None:
    """Stages the samples of a finished folder again, so that cases which were added or repaired can join them.

    Raises PackError where a packed case is no longer there, has changed, or was packed with another configuration, and
    ShardError where a sample is damaged.
    """
    by_key = {job.key: job for job in jobs}
    changed = [
        key for key, fingerprint in report.staged.items() if key not in by_key or by_key[key].fingerprint != fingerprint
    ]
    if changed or not report.staged:
        raise _packed_otherwise(
            out, f"{len(changed)} cases, the first is {changed[0]}" if changed else "by an older pack"
        )
    (out / STAGING).mkdir(exist_ok=True)
    store = Store(out)
    for record in read_index(store).samples:
        path = by_key[record.key].path
        if not path.exists():
            with _writing(path):
                write_shard(path, [read_sample(store, record)])
    (out / INDEX).unlink()
    console.print(
        f"{out}: {len(report.staged)} packed cases are kept, {len(jobs) - len(report.staged)} others are tried"
    )


def _open_jobs(config: PackConfig, cases: list[Case], rules: Rules, console: Console) -> list[Job]:
    """All jobs, with the folder made ready for them: one that is finished is opened again for the cases added since."""
    out = Path(config.out)
    if (out / INDEX).exists():
        finished = _finished(out)
        if config.part:
            raise PackError(f"out: {out} is complete and cases were added since: pack them without slice")
        if finished.samples_per_shard != config.samples_per_shard:
            raise _packed_otherwise(out, f"samples_per_shard={finished.samples_per_shard}")
        _reopen(out, finished, _jobs_of(cases, rules, out / STAGING), console)
    return _jobs_of(cases, rules, _open_staging(out))


def _open_staging(out: Path) -> Path:
    staging = out / STAGING
    if not staging.is_dir() and any(out.glob("*.tar")):
        raise PackError(f"out: {out} holds tars that an unfinished pack did not leave: give another folder")
    staging.mkdir(parents=True, exist_ok=True)
    return staging


def _jobs_of(cases: list[Case], rules: Rules, staging: Path) -> list[Job]:
    jobs = [Job(case, _key_of(case.id), rules, staging, rules.fingerprint(_stat_of(case))[:16]) for case in cases]
    counts = Counter(job.key for job in jobs)
    twice = [job.case.id for job in jobs if counts[job.key] > 1]
    if twice:
        raise PackError(f"cases {', '.join(twice[:10])} have one key: give them ids that differ in letters and digits")
    return jobs


def _key_of(id: str) -> str:
    """The id in the characters of a key; a hash tells apart those that have letters beyond ASCII."""
    if not id.isascii():
        # In one spelling: macOS stores an accent apart from its letter.
        name = unicodedata.normalize("NFC", id)
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:KEY_HASH]
        return f"{_in_ascii(name)[: KEY_LENGTH - KEY_HASH - 1]}-{digest}"
    key = _in_ascii(id)
    if len(key) > KEY_LENGTH:
        raise PackError(f"case {id}: its id is longer than {KEY_LENGTH} characters: shorten it, or use cases=FILE")
    return key


def _in_ascii(name: str) -> str:
    # WebDataset ends a key at its first dot.
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


# Running


def _workers(config: PackConfig, jobs: list[Job]) -> int:
    return min(config.workers or len(os.sched_getaffinity(0)), len(jobs))


def _run(jobs: list[Job], workers: int, console: Console) -> dict[str, Staged | BadCase]:
    """Key -> what became of the case."""
    outcomes: dict[str, Staged | BadCase] = {}
    with _progress(console) as progress:
        task = progress.add_task("packing", total=len(jobs))
        for key, outcome in _run_here(jobs) if workers == 1 else _run_apart(jobs, workers):
            outcomes[key] = outcome
            progress.advance(task)
    return outcomes


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f} volumes/s" if speed else "- volumes/s")


def _run_here(jobs: list[Job]) -> Iterator[tuple[str, Staged | BadCase]]:
    return ((job.key, _stage(job)) for job in jobs)


def _run_apart(jobs: list[Job], workers: int) -> Iterator[tuple[str, Staged | BadCase]]:
    """Raises PackError where workers are killed one after the other and none finishes a case."""
    killed: list[Job] = []
    for done, (job, outcome) in enumerate(_share_out(jobs, workers)):
        if outcome:
            yield job.key, outcome
            continue
        killed.append(job)
        log.warning("a worker was killed over case %s (%s): it is tried again, alone", job.case.id, job.case.image)
        if len(killed) == done + 1 == PATIENCE * workers:
            raise PackError(
                f"{len(killed)} workers were killed and none finished a case, in hand were "
                f"{listed([job.case.id for job in killed])}: likely for want of memory, give fewer workers="
            )
    # Alone: what kills a worker then is its own case, not those beside it.
    for job, outcome in _share_out(killed, 1):
        yield job.key, outcome or BadCase(job.case.id, str(job.case.image), _killed_twice(job))


def _killed_twice(job: Job) -> str:
    return (
        f"{job.case.image}: its worker was killed twice, the second time with no other beside it, likely for want of "
        "memory: leave the case out or give more"
    )


def _share_out(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Staged | BadCase | None]]:
    """Each job and what became of it, as they end; None where the worker was killed over it."""
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
        _log_again(record)
    return outcome


class _Worker:
    """A process with one case in hand, in a pool of its own: a larger pool dies as a whole and names no case."""

    def __init__(self) -> None:
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # One process imports what they all need; it has no threads, so forking it is safe.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "SimpleITK"])
        return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_worker)

    def take(self, job: Job) -> Future[tuple[Staged | BadCase, list[logging.LogRecord]]]:
        try:
            return self._pool.submit(_stage_apart, job)
        except BrokenProcessPool:  # killed over an earlier case, or while it waited for one
            self._pool = self._start()
            return self._pool.submit(_stage_apart, job)

    def dismiss(self) -> None:
        """Waits for the case in hand."""
        self._pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    # Ctrl-C reaches the whole group: the parent cancels what waits, and a case in hand is staged first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    logger = logging.getLogger("segvol_pl")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def _die_with_parent() -> None:
    """A killed parent cannot tell its workers; without this they would wait for ever."""
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


def _stage_apart(job: Job) -> tuple[Staged | BadCase, list[logging.LogRecord]]:
    """`_stage` in a worker, with its log records: only the parent knows where they go."""
    collector, logger = _Collector(), logging.getLogger("segvol_pl")
    logger.addHandler(collector)
    try:
        return _stage(job), collector.records
    finally:
        logger.removeHandler(collector)


def _log_again(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _stage(job: Job) -> Staged | BadCase:
    """Packs the case into the staging folder unless it lies there already.

    Whatever is wrong with the case makes it a BadCase. Raises PackError where the staging folder cannot be written,
    which is wrong for every case.
    """
    if not job.path.exists():
        try:
            sample = pack_case(job.case, job.key, job.rules, _source_of(job.case))
        except Exception as error:
            log.debug("case %s: %s", job.case.id, traceback.format_exc())
            return BadCase(job.case.id, str(job.case.image), _reason(error, job.case))
        with _writing(job.path, f"case {job.case.id}: "):
            write_shard(job.path, [sample])
    record, facts = walk_shard(job.path)[0]
    return Staged(job.case.id, record, facts.source["content_sha256"], job.fingerprint)


def _reason(error: Exception, case: Case) -> str:
    """Why a case cannot be used, in one line that names its file."""
    if isinstance(error, VolumeError | SampleError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{case.image}: there is not enough memory for it: give fewer workers= or leave it out"
    text = " ".join(str(error).split())
    return f"{case.image} cannot be packed ({type(error).__name__}: {text}): mend the case's files or leave it out"


@contextmanager
def _writing(path: Path, whose: str = "") -> Iterator[None]:
    """Raises PackError, naming the file, for what keeps it from being written."""
    try:
        yield
    except NoRoomError as error:
        raise PackError(f"{whose}{error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise PackError(f"{whose}{path} cannot be written ({reason}): mend that, then run again to go on") from error


def _source_of(case: Case) -> dict[str, str]:
    source = {"image": case.image.name, "image_sha256": source_sha256(case.image), **case.notes}
    if case.label is not None:
        source |= {"label": case.label.name, "label_sha256": source_sha256(case.label)}
    if case.masks:
        digests = {name: [source_sha256(path) for path in paths] for name, paths in case.masks.items()}
        together = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        source |= {"label": f"{len(digests)} files", "label_sha256": together}
    return source


# Joining


def _drop_duplicates(staged: list[Staged]) -> tuple[list[Staged], dict[str, str]]:
    """The cases without those whose voxels an earlier one holds too, and those: left out -> kept."""
    first: dict[str, Staged] = {}
    for case in staged:
        first.setdefault(case.content_sha256, case)
    doubles = {case.id: first[case.content_sha256].id for case in staged if first[case.content_sha256] is not case}
    return list(first.values()), doubles


def _print_left_out(report: PackReport, console: Console) -> None:
    if report.bad:
        table = Table("case", "file", "reason", title=f"{len(report.bad)} of {report.cases} cases cannot be used")
        for case in report.bad:
            table.add_row(case.id, case.file, case.reason)
        console.print(table)
    for left_out, kept in report.duplicates.items():
        console.print(f"{left_out} holds the same voxels as {kept}: left out")


def _check_bound(report: PackReport, config: PackConfig, out: Path, start: float) -> None:
    bad = len(report.bad)
    if bad <= config.max_bad_fraction * report.cases and bad < report.cases:
        return
    write_text(out / REPORT, _report_json(replace(report, seconds=time.monotonic() - start)))
    first = report.bad[0]
    raise PackError(
        f"{bad} of {report.cases} cases cannot be used, max_bad_fraction={config.max_bad_fraction} allows fewer: "
        f"mend or leave out those that {out / REPORT} lists; the first is {first.id}: {first.reason}"
    )


def _report_json(report: PackReport) -> str:
    return json.dumps(asdict(report), indent=1) + "\n"


def _finish(
    kept: list[Staged], report: PackReport, config: PackConfig, dataset: str, start: float, console: Console
) -> PackReport:
    """Shards, then the report, then the index that makes the folder whole, then the staging folder goes."""
    out = Path(config.out)
    shards = _join_shards(kept, config, dataset)
    splits = Counter(case.record.split for case in kept)
    report = replace(
        report,
        staged={case.record.key: case.fingerprint for case in kept},
        samples_per_shard=config.samples_per_shard,
        splits=dict(sorted(splits.items())),
        shards=[shard.name for shard in shards],
        bytes=sum(shard.stat().st_size for shard in shards),
        seconds=time.monotonic() - start,
    )
    write_text(out / REPORT, _report_json(report))
    write_text(out / SPLITS, _splits_csv(kept))
    build_index(out)
    shutil.rmtree(out / STAGING)
    _print_summary(report, out, console)
    return report


def _join_shards(kept: list[Staged], config: PackConfig, dataset: str) -> list[Path]:
    """A shard holds one split only: who reads tars without the index cannot mix them up."""
    out = Path(config.out)
    # A joining that was killed left shards, and parts of them under names that nobody would take up again.
    for stale in [*out.glob("*.tar"), *out.glob(".*.part")]:
        stale.unlink()
    shards: dict[Path, list[SampleRecord]] = {}
    stem = _in_ascii(dataset)[:KEY_LENGTH]
    for split in Split:
        records = [case.record for case in kept if case.record.split == split.value]
        for first in range(0, len(records), config.samples_per_shard):
            name = f"{stem}-{split.value}-{first // config.samples_per_shard:05d}.tar"
            shards[out / name] = records[first : first + config.samples_per_shard]
    staging = Store(out / STAGING)

    def copy(path: Path) -> None:
        with _writing(path):
            write_shard(path, (read_sample(staging, record) for record in shards[path]))

    # Copying waits for the disk: threads are enough.
    with ThreadPoolExecutor(COPIES) as threads:
        list(threads.map(copy, shards))
    return list(shards)


def _splits_csv(kept: list[Staged]) -> str:
    """Which case is in which split, by the sha256 of its voxels."""
    rows = sorted((case.record.split, case.record.key, case.content_sha256) for case in kept)
    return "\n".join(["split,key,content_sha256", *(",".join(row) for row in rows)]) + "\n"


def _print_summary(report: PackReport, out: Path, console: Console) -> None:
    splits = ", ".join(f"{count} {split}" for split, count in report.splits.items())
    rate = report.packed / max(report.seconds, 1e-9)
    console.print(
        f"{out}: {report.packed} samples ({splits}) in {len(report.shards)} shards, {report.bytes / 1e6:.1f} MB, "
        f"{report.seconds:.1f} s ({rate:.2f} volumes/s)"
    )
    if len(report.splits) == 1:
        split = next(iter(report.splits))
        log.warning("%s: all cases fall into the split %s by the hash of their content", out, split)
