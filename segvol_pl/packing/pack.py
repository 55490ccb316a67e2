"""CT files into shards (command `pack`).

1. `pack` finds the cases (`cases.py`, `recipes.py`, `m3d.py`) and makes a `Job` of each.
2. Worker processes stage them, each case as a tar of its own (`pool.py`, `stage.py`). With `part=K/N` a run stages its
   part of the cases and ends: many machines share the work.
3. The staged cases are joined into shards in the order of their keys (`join.py`). The report comes next, then the
   index, which makes the folder complete; then the staging folder is removed.

Equal cases and an equal configuration give byte-identical shards, however often the run was interrupted and whatever
the number of workers and parts. Cases that cannot be used are listed and left out, up to `max_bad_fraction`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import blosc2
from rich.console import Console

from segvol_pl.config import PackConfig, parse_part
from segvol_pl.config.categories import load_categories
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.store import INDEX
from segvol_pl.errors import PackError
from segvol_pl.folder_lock import FolderLock
from segvol_pl.imaging.itk import simple_itk, sitk
from segvol_pl.packing.cases import Case, pair_cases, read_cases
from segvol_pl.packing.join import drop_duplicates, join, take_apart
from segvol_pl.packing.m3d import is_m3d, m3d_cases
from segvol_pl.packing.pool import Work, run_jobs
from segvol_pl.packing.prepare import Rules
from segvol_pl.packing.recipes import DatasetRecipe, read_recipe, recipe_cases
from segvol_pl.packing.report import REPORT, PackReport, print_left_out, print_summary, read_report, write_splits
from segvol_pl.packing.stage import STAGING, BadCase, Job, Staged, fingerprint_of, key_of, stage, stat_of

log = logging.getLogger(__name__)


def pack(config: PackConfig, console: Console | None = None) -> PackReport:
    """Pack the configured cases into `config.out` and return the report, which is also written there.

    A folder that was packed from the same cases and configuration is left as it is. If cases were added or repaired
    since, only these are packed, and all shards are written again.

    Args:
        config: The configuration.
        console: Shows progress and summary; by default nothing is shown.

    Raises:
        CaseError: Cases or categories cannot be found or paired.
        LockedError: Another process packs into `out`.
        PackError: `out` holds something else, cannot be written, or more cases cannot be used than `max_bad_fraction`
            allows. Then no index is written.
    """
    console = console or Console(quiet=True)
    start, out = time.monotonic(), Path(config.out)
    recipe = read_recipe(config.recipe) if config.recipe else None
    rules, cases = _rules_of(config, recipe), _cases_of(config, recipe, console)
    parts = (config.samples_per_shard, [stat_of(case) for case in cases])
    if (out / INDEX).exists():
        finished = read_report(out)
        if finished.fingerprint == rules.fingerprint(*parts, versions=finished.versions):
            shutil.rmtree(out / STAGING, ignore_errors=True)
            console.print(f"{out} is complete ({finished.packed} samples): nothing to do")
            return finished
    fingerprint = rules.fingerprint(*parts)
    simple_itk()  # If it is missing, one error here instead of one for each case.
    with _lock(config):
        jobs = _open_jobs(config, cases, rules, console)
        if config.part:
            number, count = parse_part(config.part)
            return _stage_part(jobs[number::count], config, fingerprint, console)
        outcomes = _stage_all(jobs, config.workers, console)
        kept, duplicates = drop_duplicates([outcome for outcome in outcomes if isinstance(outcome, Staged)])
        bad = [outcome for outcome in outcomes if isinstance(outcome, BadCase)]
        report = PackReport(len(cases), fingerprint, bad, duplicates)
        print_left_out(report, console)
        _check_bad(report, config, start)
        return _finish(kept, report, config, rules.dataset, start, console)


def list_jobs(config: PackConfig) -> list[Job]:
    """Return the cases that `pack` would take, with their keys and rules, to be read without packing.

    Raises CaseError or PackError as `pack` does for cases and categories that cannot be found or paired.
    """
    recipe = read_recipe(config.recipe) if config.recipe else None
    cases = _cases_of(config, recipe, Console(quiet=True))
    return _jobs_of(cases, _rules_of(config, recipe), Path(config.out) / STAGING)


# Cases and rules


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
    cases = _find_cases(config, recipe)
    if recipe:
        found = len(cases)
        cases = [case for case in cases if not recipe.excludes(case.id)]
        console.print(f"{recipe.title}: {len(cases)} cases of the paper's {recipe.volumes}")
        if len(cases) < found:
            console.print(f"{found - len(cases)} cases are left out: {recipe.exclude_reason}")
        if not recipe.certain:
            log.warning("%s: not certain: %s", config.recipe, recipe.doubts)
    elif any(case.label and not case.channels for case in cases) and not config.categories:
        raise PackError("categories: the cases have labels: give categories=FILE (YAML: name -> label values)")
    return cases


def _find_cases(config: PackConfig, recipe: DatasetRecipe | None) -> list[Case]:
    if config.cases:
        return m3d_cases(config.cases, recipe) if is_m3d(config.cases) else read_cases(config.cases)
    return recipe_cases(recipe, str(config.images)) if recipe else pair_cases(str(config.images), config.labels)


# The folder


def _lock(config: PackConfig) -> FolderLock:
    """Parts stage at the same time. A run that joins them, or packs alone, needs the folder for itself."""
    if config.part:
        return FolderLock(Path(config.out), f".lock-{config.part.replace('/', '-of-')}.json", against=".lock.json")
    return FolderLock(Path(config.out), against=".lock-*.json")


def _open_jobs(config: PackConfig, cases: list[Case], rules: Rules, console: Console) -> list[Job]:
    """Make the folder ready and return all jobs. A finished folder is taken apart, so that new cases can be added."""
    out = Path(config.out)
    if (out / INDEX).exists():
        if config.part:
            raise PackError(f"out: {out} is complete and cases were added since: pack them without part=")
        _reopen(out, config, cases, rules, console)
    return _jobs_of(cases, rules, _open_staging(out))


def _reopen(out: Path, config: PackConfig, cases: list[Case], rules: Rules, console: Console) -> None:
    """Take a finished folder apart.

    Raises PackError if a packed case is gone, has changed, or was packed with another configuration, and ShardError if
    a sample is damaged.
    """
    finished, by_key = read_report(out), {job.key: job for job in _jobs_of(cases, rules, out / STAGING)}
    if finished.samples_per_shard != config.samples_per_shard:
        raise _packed_otherwise(out, f"samples_per_shard={finished.samples_per_shard}")
    if not finished.staged:
        raise _packed_otherwise(out, "by an older version")
    if finished.versions[-1] != blosc2.__version__:
        raise _packed_otherwise(out, f"with Blosc2 {finished.versions[-1]}, now it is {blosc2.__version__}")
    # As they were then: repack changes the shards' encoding, not the fingerprints.
    found = {key: fingerprint_of(job.case, rules, finished.versions) for key, job in by_key.items()}
    changed = [key for key, fingerprint in finished.staged.items() if found.get(key) != fingerprint]
    if changed:
        raise _packed_otherwise(out, f"{len(changed)} cases, the first is {changed[0]}")
    take_apart(out, by_key)
    added = len(by_key) - len(finished.staged)
    console.print(f"{out}: {len(finished.staged)} packed cases are kept, {added} others are tried")


def _packed_otherwise(out: Path, how: str) -> PackError:
    return PackError(
        f"out: {out} is packed from other files or with another configuration ({how}): give another folder"
    )


def _open_staging(out: Path) -> Path:
    staging = out / STAGING
    if not staging.is_dir() and any(out.glob("*.tar")):
        raise PackError(f"out: {out} holds tars that are not from an unfinished pack: give another folder")
    staging.mkdir(parents=True, exist_ok=True)
    return staging


def _jobs_of(cases: list[Case], rules: Rules, staging: Path) -> list[Job]:
    jobs = [Job(case, key_of(case.id), rules, staging, fingerprint_of(case, rules)) for case in cases]
    counts = Counter(job.key for job in jobs)
    twice = [job.case.id for job in jobs if counts[job.key] > 1]
    if twice:
        raise PackError(f"cases {', '.join(twice[:10])} have one key: give them ids that differ in letters and digits")
    return jobs


# Staging


def _stage_all(jobs: list[Job], workers: int, console: Console) -> list[Staged | BadCase]:
    """Stage all jobs; return what became of them, in the order of their keys.

    Raises PackError if the staging folder cannot be written, or if workers are killed and none finishes a case.
    """
    work = Work(stage, lambda job: f"{job.case.id} ({job.case.image})", prepare=_read_with_one_thread)
    outcomes = {job.key: outcome or _killed(job) for job, outcome in run_jobs(work, jobs, workers, console)}
    return [outcome for _, outcome in sorted(outcomes.items())]


def _read_with_one_thread() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _killed(job: Job) -> BadCase:
    return BadCase(
        job.case.id,
        str(job.case.image),
        f"{job.case.image}: its worker was killed twice, the second time with no other one running; memory is likely "
        "too small: leave the case out or use more memory",
    )


# The end of a run


def _stage_part(jobs: list[Job], config: PackConfig, fingerprint: str, console: Console) -> PackReport:
    """Stage the jobs of a part. The run that joins the parts tries bad cases again."""
    if not jobs:
        console.print(f"part {config.part}: no case is in it")
        return PackReport(0, fingerprint, [], {})
    outcomes = _stage_all(jobs, config.workers, console)
    bad = [outcome for outcome in outcomes if isinstance(outcome, BadCase)]
    report = PackReport(len(jobs), fingerprint, bad, {})
    print_left_out(report, console)
    console.print(f"part {config.part}: {len(jobs) - len(bad)} of {len(jobs)} cases staged: run without part= to join")
    return report


def _check_bad(report: PackReport, config: PackConfig, start: float) -> None:
    bad, out = len(report.bad), Path(config.out)
    if bad <= config.max_bad_fraction * report.cases and bad < report.cases:
        return
    replace(report, seconds=time.monotonic() - start).write(out)
    first = report.bad[0]
    raise PackError(
        f"{bad} of {report.cases} cases cannot be used, max_bad_fraction={config.max_bad_fraction} allows fewer: "
        f"repair or leave out those listed in {out / REPORT}; the first is {first.id}: {first.reason}"
    )


def _finish(
    kept: Sequence[Staged], report: PackReport, config: PackConfig, dataset: str, start: float, console: Console
) -> PackReport:
    """Write the shards, then the report, then the index, which makes the folder complete; then remove the staging."""
    out = Path(config.out)
    shards = join(kept, out, dataset, config.samples_per_shard)
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
    report.write(out)
    write_splits(out, kept)
    build_index(out)
    shutil.rmtree(out / STAGING)
    print_summary(report, out, console)
    return report
