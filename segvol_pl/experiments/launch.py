"""The runs of a grid on their way: how far each is, one of them, all of them, and the sweep that wandb starts.

1. A run folder holds `grid.json`: who runs it, since when, or how it ended.
2. `start` runs one: skipped where it is finished, else begun, or gone on with from its last checkpoint.
3. `start_all` runs one after another, each in a process of its own, so that one that fails leaves the others alone.
4. `sweep` writes the file for `wandb sweep`, whose agents call the same command line.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from segvol_pl.atomic import write_text
from segvol_pl.config import loader
from segvol_pl.credentials import masked
from segvol_pl.errors import ConfigError, RunError
from segvol_pl.experiments.grid import Grid, Run, parameters, volume_flops
from segvol_pl.folder_lock import FolderLock, is_running
from segvol_pl.run_folder import GRID_ENTRY, read_grid_entry

log = logging.getLogger(__name__)

MISSING, RUNNING, PARTIAL, FAILED, FINISHED, CHANGED = "missing", "running", "partial", "failed", "finished", "changed"
SILENCE = 900.0
"""Seconds without a logged step after which a run on another machine counts as stopped."""


@dataclass(frozen=True)
class State:
    """How far a run is: one of missing, running, partial, failed, finished, changed."""

    name: str
    step: int = 0
    detail: str = ""
    """Why it failed, what was changed, where it runs."""


def state(run: Run) -> State:
    """By the run folder alone. `changed`: the folder holds a run of another configuration."""
    record, step = read_grid_entry(run.out), _last_step(run.out / "metrics.csv")
    if record is None and not (run.out / "config.yaml").exists():
        return State(MISSING)
    if changed := _changed(run):
        return State(CHANGED, step, changed)
    record = record or {"state": PARTIAL}
    if record["state"] != RUNNING:
        return State(record["state"], step, record.get("error", ""))
    return State(RUNNING, step, f"on {record['host']}") if _lives(run.out, record) else State(PARTIAL, step)


def start(run: Run, call: Callable[[Any], Any], first: bool) -> None:
    """Runs it in this process; nothing where it is finished. `call` takes the configuration; `first`: this is rank 0.

    Raises RunError for a folder of another run, LockedError where another process runs it, and what the run raises.
    """
    before = state(run)
    if before.name == FINISHED:
        log.info("run %d %s: finished before, skipped", run.number, run.name)
        return
    if before.name == CHANGED:
        raise RunError(f"{run.out} holds a run with {before.detail}: give out=DIR, or remove the folder")
    if not first:
        call(run.config)
        return
    with FolderLock(run.out):
        log.info("run %d %s: was %s, step %d", run.number, run.name, before.name, before.step)
        _write(run, RUNNING)
        try:
            call(run.config)
        except Exception as error:
            _write(run, FAILED, error=masked(f"{type(error).__name__}: {' '.join(str(error).split())}"))
            raise
        _write(run, FINISHED)


def start_all(grid: Grid, runs: Sequence[Run], given: Sequence[str]) -> None:
    """One after another; finished ones are skipped. Raises RunError that names those that failed, at the end."""
    failed = []
    for run in runs:
        if state(run).name == FINISHED:
            log.info("run %d %s: finished before, skipped", run.number, run.name)
            continue
        command = [sys.executable, "-m", "segvol_pl", "grid", str(grid.path), f"run={run.number}", *given]
        if subprocess.run(command, check=False).returncode:
            failed.append(run)
    if failed:
        names = ", ".join(f"{run.number} {run.name}" for run in failed)
        raise RunError(f"{len(failed)} of {len(runs)} runs did not finish: {names}; the same command tries them again")


def sweep(grid: Grid, runs: Sequence[Run], given: Sequence[str]) -> str:
    """The YAML of a wandb sweep over the numbers of the runs. `wandb agent` then calls `segvol-pl grid FILE run=K`."""
    project = {run.config.track.project for run in runs}
    if len(project) > 1:
        raise ConfigError(f"track.project: a sweep lies in one project, these runs in {', '.join(sorted(project))}")
    content = {
        "name": grid.name,
        "project": project.pop(),
        "method": "grid",
        "command": ["segvol-pl", "grid", str(grid.path), *map(masked, given), "${args_no_hyphens}"],
        "parameters": {"run": {"values": [run.number for run in runs]}},
    }
    return str(yaml.safe_dump(content, sort_keys=False))


# ---- what a run folder tells ----


def _write(run: Run, name: str, **more: str) -> None:
    process = psutil.Process()
    started = {"host": socket.gethostname(), "pid": os.getpid(), "started": process.create_time(), "at": time.time()}
    run.out.mkdir(parents=True, exist_ok=True)
    record = {"state": name, "name": run.name, "command": run.command, "places": run.places, **started, **more}
    write_text(run.out / GRID_ENTRY, json.dumps(record, indent=2) + "\n")


def _changed(run: Run) -> str:
    """What differs from the run in the folder; nothing where there is no checkpoint to go on from."""
    path = run.out / "config.yaml"
    if not path.exists() or not (run.out / "checkpoints" / "last.ckpt").exists():
        return ""
    try:
        before = loader.plain(loader.load(run.command, [str(path)]))
    except ConfigError as error:
        return str(error)
    return ", ".join(loader.differences(before, loader.plain(run.config))[:3])


def _lives(out: Path, record: dict[str, Any]) -> bool:
    """Whether the process that wrote the record is there; of another machine's, whether it logged lately."""
    if record["host"] != socket.gethostname():
        metrics = out / "metrics.csv"
        last = max(record["at"], metrics.stat().st_mtime if metrics.exists() else 0)
        return bool(time.time() - last < SILENCE)
    return is_running(record["pid"], record["started"])


def _last_step(metrics: Path) -> int:
    """Of the last row; a row that was cut counts as none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - 4096))
        steps = [line.split(b",")[0] for line in stream.read().splitlines()[1:]]
    return max((int(step) for step in steps if step.isdigit()), default=0)


# ---- the listing ----


def describe(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One row a run: number, name, state, step of how many, parameters, training FLOPs, and what else is known."""
    return [_described(run, state(run)) for run in runs]


def _described(run: Run, now: State) -> dict[str, str]:
    steps = run.config.optim.max_steps
    spent = steps * run.config.data.global_batch * volume_flops(run.config)
    return {
        "run": str(run.number),
        "name": run.name,
        "state": now.name,
        "step": f"{now.step}/{steps}",
        "parameters": f"{parameters(run.config):,}",
        "flops": f"{spent:.2e}",
        "": now.detail,
    }


def held_out(runs: Sequence[Run]) -> str:
    """Whether all runs are held against the same volumes, and none trains on them. Reads the shards' indexes."""
    # Reading shards imports torch, which expanding a grid must not.
    from segvol_pl.data.corpus import held_out_corpus, open_folders, training_corpus
    from segvol_pl.errors import ShardError

    sets, leaking = set(), []
    seen: dict[str, tuple[frozenset[str], int]] = {}
    for run in runs:
        data, labelled = run.config.data, run.command == "train"
        key = repr((data.shards, data.mix, data.split, data.val_split, data.fraction))
        try:
            if key not in seen:
                folders = open_folders(data)
                held = _contents(held_out_corpus(folders, data.val_split, labelled))
                seen[key] = held, len(held & _contents(training_corpus(folders, data, labelled)))
        except (ShardError, ConfigError, OSError) as error:
            return f"held-out volumes not checked: {error}"
        sets.add(seen[key][0])
        leaking += [run.name] if seen[key][1] else []
    same = f"the same {len(next(iter(sets)))} for all runs" if len(sets) == 1 else f"{len(sets)} DIFFERENT SETS"
    leak = f"TRAINED ON TOO by {len(leaking)} runs, {leaking[0]} first" if leaking else "none of them is trained on"
    return f"held-out volumes: {same}; {leak}"


def _contents(corpus: Any) -> frozenset[str]:
    """What the volumes are, by the hash of their voxels; by name where an index of old holds none."""
    return frozenset(record.content or record.key for record in corpus.records)
