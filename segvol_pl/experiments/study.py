"""The jobs of `segvol-pl paper`, and running them.

1. `plan` lists the jobs: make phantoms, pack them, pre-train, train each run with each seed, evaluate. Each is a `Run`,
   as in a grid: a command, its checked configuration and its folder.
2. Which job needs which follows from the configurations: a job needs the one that writes a folder that it names. Only
   jobs that a claim's figures need, directly or not, are kept. Jobs of one stage do not need each other.
3. `start` runs one job; `start_all` runs all that are not finished, several at a time, each in a process of its own.
   `launch` keeps their state, so finished ones are skipped and stopped ones resume.

Imports neither torch nor lightning: a wrong key must fail at once.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segvol_pl.config import PaperConfig, loader
from segvol_pl.config.loader import Written
from segvol_pl.errors import ConfigError, RunError, listed
from segvol_pl.experiments import claims as files
from segvol_pl.experiments import launch
from segvol_pl.experiments.claims import Claim, Recipe, Size
from segvol_pl.experiments.grid import Grid, Point, Run, expand

log = logging.getLogger(__name__)

RUN = "run"
"""Axis of the training runs."""
LOGS = "logs"
EVALUATION = "evaluation-"
"""Prefix of the folder of an evaluation, within the folder of the run that it evaluates."""
DECIDED = ("checkpoint", "out")
"""Keys of an evaluation that the study sets itself."""


@dataclass(frozen=True)
class Job:
    """One job."""

    run: Run
    stage: int
    """Jobs of a stage need only jobs of earlier stages."""
    needs: list[int]
    """Numbers of the jobs that must be finished before."""

    @property
    def number(self) -> int:
        """Its number, in the order of the stages."""
        return self.run.number

    @property
    def name(self) -> str:
        """Command and name of the run."""
        return f"{self.run.command} {self.run.name}"


@dataclass(frozen=True)
class Study:
    """Claims at one size, and the jobs that give their figures."""

    size: Size
    claims: list[Claim]
    out: Path
    shards: str
    """Folder of the data sets."""
    seeds: list[int]
    jobs: list[Job]

    def evaluation(self, run: str, seed: int, evaluation: str) -> Path:
        """Return the folder of the evaluation of a run."""
        return self.out / "train" / run_name(run, seed) / f"{EVALUATION}{evaluation}"


def run_name(run: str, seed: int) -> str:
    """Return the name of a training run, which is that of its folder."""
    return f"{RUN}-{run}_seed-{seed}"


# ---- the jobs ----


def plan(config: PaperConfig, given: Sequence[str] = ()) -> Study:
    """List the jobs of a configuration.

    Args:
        config: Which claims, at which size, where.
        given: KEY=VALUE for every training run. A key that pre-training does not have is for `train` alone.

    Raises:
        ConfigError: A file or the configuration of a job is invalid; names file and line.
    """
    size, claims = files.read_all(config)
    out = Path(config.out or f"runs/paper-{size.name}")
    if config.shards is None and not size.data_sets:
        raise ConfigError(f"shards: size {size.name} needs shards=DIR, with a folder per data set", "shards")
    shards = config.shards or str(out / "shards")
    study = Study(size, claims, out, shards, config.seeds or size.seeds, [])
    runs = [*([] if config.shards else _data(study)), *_pretraining(study, given), *_training(study, given)]
    runs += _evaluations(study)
    return replace(study, jobs=_ordered(runs, study))


def _data(study: Study) -> list[Run]:
    """Make and pack the phantoms."""
    making, recipe = (study.size.stages.get(stage, Recipe()) for stage in ("phantoms", "pack"))
    found = []
    for name, pairs in study.size.data_sets.items():
        made, packed = study.out / "phantoms" / name, study.out / "shards" / name
        sources = [f"{part}={made / part}" for part in ("images", "labels")]
        packing = [*recipe.files, *recipe.set, *sources, f"categories={made / 'categories.yaml'}", f"dataset={name}"]
        found.append(_run("phantoms", name, made, [*making.files, *making.set, *pairs, f"out={made}"]))
        found.append(_run("pack", name, packed, [*packing, f"out={packed}"]))
    return found


def _run(command: str, name: str, out: Path, arguments: list[str], places: Mapping[str, str] | None = None) -> Run:
    return Run(0, name, command, out, dict(places or {}), arguments, loader.load(command, arguments))


def _pretraining(study: Study, given: Sequence[str]) -> list[Run]:
    if "pretrain" not in study.size.stages:
        return []
    known = {field.key for field in loader.fields_help("pretrain")}
    fitting = [pair for pair in given if (key := pair.partition("=")[0]) in known or loader.is_section("pretrain", key)]
    return expand(_grid(study, "pretrain"), fitting)


def _training(study: Study, given: Sequence[str]) -> list[Run]:
    runs = files.merged(claim.runs for claim in study.claims)
    axis = [Point(name, [_placed(study, pair) for pair in pairs]) for name, pairs in runs.items()]
    return expand(replace(_grid(study, "train"), axes={RUN: axis}), given)


def _grid(study: Study, command: str) -> Grid:
    recipe = study.size.stages[command]
    settings = [_placed(study, pair) for pair in (*study.size.set, *recipe.set)]
    return Grid(study.size.path, study.out / command, command, recipe.files, settings, study.seeds)


def _placed(study: Study, pair: Written) -> Written:
    """Replace {out} and {shards}; the grid replaces {run} and {seed}."""
    return Written(pair.replace("{out}", str(study.out)).replace("{shards}", study.shards), pair.origin)


def _evaluations(study: Study) -> list[Run]:
    """One for each evaluation, run and seed that a figure needs."""
    recipe = study.size.stages["evaluate"]
    evaluations = files.merged(claim.evaluations for claim in study.claims)
    wanted = dict.fromkeys((each.run, each.evaluation) for claim in study.claims for each in claim.figures.values())
    found = []
    for run, evaluation in wanted:
        pairs = [_placed(study, pair) for pair in (*recipe.set, *evaluations[evaluation])]
        for pair in pairs:
            if (key := pair.partition("=")[0]) in DECIDED:
                raise ConfigError(f"{key} ({pair.origin}): `segvol-pl paper` sets it: leave it out")
        for seed in study.seeds:
            folder = study.evaluation(run, seed, evaluation)
            chosen = [f"checkpoint={folder.parent / 'checkpoints' / 'last.ckpt'}", f"out={folder}"]
            places = {RUN: run, "evaluation": evaluation, "seed": str(seed)}
            name = f"{run_name(run, seed)}_{evaluation}"
            found.append(_run("evaluate", name, folder, [*recipe.files, *pairs, *chosen], places))
    return found


# ---- which needs which ----


def _ordered(runs: Sequence[Run], study: Study) -> list[Job]:
    """Keep what the evaluations need, and number it stage by stage."""
    needs = [_needs(run, runs, study) for run in runs]
    stages: dict[int, int] = {}

    def stage(place: int, through: tuple[int, ...] = ()) -> int:
        if place in through:
            raise ConfigError(f"{study.size.path}: {runs[place].name} starts from itself: see its KEY=VALUE")
        if place not in stages:
            stages[place] = 1 + max((stage(other, (*through, place)) for other in needs[place]), default=-1)
        return stages[place]

    for place, run in enumerate(runs):
        if run.command == "evaluate":
            stage(place)
    order = sorted(stages, key=lambda place: (stages[place], place))
    number = {place: count for count, place in enumerate(order)}
    return [
        Job(replace(runs[place], number=number[place]), stages[place], sorted(number[other] for other in needs[place]))
        for place in order
    ]


def _needs(run: Run, runs: Sequence[Run], study: Study) -> list[int]:
    """Places of the runs whose folder the configuration names. Raises ConfigError for a folder that no run writes."""
    found = []
    for key, text in _texts(loader.flat(loader.plain(run.config))):
        if key in ("out", "run.out") or f"{study.out}/" not in text:
            continue
        writers = [place for place, other in enumerate(runs) if f"{other.out}/" in f"{text}/"]
        # An evaluation lies in the folder of its run.
        writers = [place for place in writers if runs[place].out != run.out]
        if not writers:
            raise ConfigError(f"{key} of {run.command} {run.name}: no job writes {text}")
        found += writers
    return list(dict.fromkeys(found))


def _texts(flat: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The texts of a configuration, also those in lists."""
    for key, value in flat.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                yield key, item


# ---- running ----


def start(study: Study, number: int, calls: Mapping[str, Callable[[Any], Any]], first: bool) -> None:
    """Run one job in this process, unless it is finished.

    Args:
        study: The plan.
        number: Of the job.
        calls: Command -> what takes its configuration and does it.
        first: Whether this process is rank 0.

    Raises:
        ConfigError: There is no such job.
        RunError: A job that it needs is not finished, or its folder holds the results of another configuration.
    """
    if number >= len(study.jobs):
        raise ConfigError(f"run={number}: expected 0 to {len(study.jobs) - 1}, all or page", "run")
    job = study.jobs[number]
    if missing := [study.jobs[need] for need in job.needs if _state(study.jobs[need]) != launch.FINISHED]:
        named = listed(f"{each.number} ({each.name})" for each in missing)
        raise RunError(f"job {number} ({job.name}) needs jobs that are not finished: {named}: run these first")
    launch.start(job.run, calls[job.run.command], first)


def start_all(study: Study, processes: int, arguments: Sequence[str]) -> None:
    """Run every job that is not finished, each as soon as those that it needs are.

    Args:
        study: The plan.
        processes: Jobs at a time.
        arguments: Of `segvol-pl paper`, without `run`.

    Raises:
        RunError: Jobs failed; the others, except those that need them, have been run.
    """
    waiting = [job for job in study.jobs if _state(job) != launch.FINISHED]
    done = {job.number for job in study.jobs} - {job.number for job in waiting}
    log.info("%d of %d jobs are already finished", len(done), len(study.jobs))
    running: dict[Future[bool], Job] = {}
    failed: list[Job] = []
    with ThreadPoolExecutor(processes) as pool:
        while True:
            ready = [job for job in waiting if done.issuperset(job.needs)][: processes - len(running)]
            for job in ready:
                waiting.remove(job)
                running[pool.submit(_run_alone, study, job, arguments, processes)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if future.result():
                    done.add(job.number)
                else:
                    failed.append(job)
    if failed:
        named = listed(f"{job.number} ({job.name})" for job in failed)
        raise RunError(
            f"{len(failed)} jobs failed: {named}; {len(waiting)} that need them were not run; see {study.out / LOGS}, "
            "and run the same command to retry them"
        )


def _run_alone(study: Study, job: Job, arguments: Sequence[str], processes: int) -> bool:
    """Run one job in a process of its own; whether it succeeded. Its output goes to a file in `LOGS`."""
    path = study.out / LOGS / f"{job.run.command}-{job.run.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    log.info("job %d of %d: %s", job.number, len(study.jobs), job.name)
    began = time.monotonic()
    with path.open("a", encoding="utf-8") as stream:
        command = [sys.executable, "-m", "segvol_pl", "paper", *arguments, f"run={job.number}"]
        environment = {**threads, **os.environ}
        status = subprocess.run(command, check=False, stdout=stream, stderr=stream, env=environment).returncode
    seconds = time.monotonic() - began
    if status:
        log.error("job %d: %s failed after %.0f s: %s", job.number, job.name, seconds, _last_line(path))
    else:
        log.info("job %d: %s finished in %.0f s", job.number, job.name, seconds)
    return status == 0


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else f"no output in {path}"


def _state(job: Job) -> str:
    return launch.state(job.run).name


# ---- the listing ----


def describe(study: Study) -> list[dict[str, str]]:
    """Return one row per job: number, stage, name, state, the jobs that it needs, and a remark."""
    rows = []
    for job in study.jobs:
        now = launch.state(job.run)
        row = {"job": str(job.number), "stage": str(job.stage), "name": job.name, "state": now.name}
        rows.append({**row, "needs": _ranges(job.needs), "": now.detail})
    return rows


def stages(study: Study) -> list[str]:
    """Return one line per stage: the range of its jobs, for a SLURM array."""
    found = []
    for stage in sorted({job.stage for job in study.jobs}):
        jobs = [job for job in study.jobs if job.stage == stage]
        kinds = ", ".join(dict.fromkeys(job.run.command for job in jobs))
        found.append(f"stage {stage}: jobs {_ranges([job.number for job in jobs])} ({kinds})")
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers in ascending order as `0-3,7`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ",".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)
